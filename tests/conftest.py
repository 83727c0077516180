"""Tiny LLaMAs of odd sizes in both formats, made by transformers, and where the real fixtures lie."""

from __future__ import annotations

import os

# One thread, here and in every process that a test starts: machines are shared, and results are compared bit by bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import io
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from listed_gpus import gpus  # noqa: F401  (a fixture)
from pretended_processors import amx  # noqa: F401  (a fixture)
from trained_tokenizers import (  # noqa: F401  (fixtures)
    chat_tokenizers,
    json_tokenizers,
    kinds_of_json,
    tokenizer,
    tokenizer_models,
)
from worker_count import pytest_xdist_auto_num_workers  # noqa: F401  (a hook)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels are interpreted on the CPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its children

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = """
a red llama walks over green hills and counts nine blue apples while cold rain falls on seven old stones
""".split()  # noqa: SIM905

_HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SHARD_AXIS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Real weights, rows and adapters that are no part of the project; tests that want them skip without."""
    default = Path(__file__).parents[1].parent / "shared" / "fixtures"
    path = Path(os.environ.get("LLAMATUNE_FIXTURES", default))
    if not (path / "stories260K-hf").is_dir():
        pytest.skip(f"no fixtures at {path} (set LLAMATUNE_FIXTURES)")
    return path


def sentence(chance: random.Random, words: int) -> str:
    """So many words of a small language."""
    return " ".join(chance.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with fewer pieces than the tiny models have embedding rows."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    chance = random.Random(3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(chance, 8) for _ in range(300)]),
        model_prefix=str(prefix),
        vocab_size=90,
        model_type="bpe",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Callable[..., Path]:
    """Random models in Hugging Face's format, by what their configuration changes; each is made once."""
    made: dict[str, Path] = {}

    def make(dtype: torch.dtype = torch.float32, model_type: str = "llama", **changes: Any) -> Path:
        key = repr((dtype, model_type, sorted(changes.items())))
        if key not in made:
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(11)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **changes}))
            for name, parameter in model.named_parameters():
                # transformers leaves every norm at 1 and bias at 0, which hides one that is not applied
                if "norm" in name or name.endswith("bias"):
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            path = tmp_path_factory.mktemp("base")
            model.to(dtype).save_pretrained(path)
            shutil.copy(tiny_tokenizer, path / "tokenizer.model")
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def meta_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same weights in Meta's format, pairs of a head interleaved, in one shard or several; ``more`` parameters."""

    def make(source: Path, shards: int = 1, **more: Any) -> Path:
        from safetensors.torch import load_file

        config = json.loads((source / "config.json").read_text())
        weights = load_file(source / "model.safetensors")
        path = tmp_path_factory.mktemp("meta")
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
        for meta_name, name in _HUGGING_FACE_NAMES.items():
            layers = range(config["num_hidden_layers"]) if name.startswith(("self", "mlp", "input", "post")) else [None]
            for layer in layers:
                prefix = "" if layer is None else f"layers.{layer}."
                tensor = weights.get(f"model.{prefix}{name}.weight" if prefix else f"{name}.weight")
                if tensor is None:
                    assert config["tie_word_embeddings"]
                    tensor = weights["model.embed_tokens.weight"]
                last = meta_name.rpartition(".")[2]
                if last in ("wq", "wk"):
                    heads = config["num_attention_heads" if last == "wq" else "num_key_value_heads"]
                    rows, columns = tensor.shape
                    tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
                pieces = tensor.chunk(shards, _SHARD_AXIS[last]) if last in _SHARD_AXIS else [tensor] * shards
                for part, piece in zip(parts, pieces, strict=True):
                    part[f"{prefix}{meta_name}.weight"] = piece.clone()
        for number, part in enumerate(parts):
            torch.save(part, path / f"consolidated.{number:02d}.pth")
        # Meta computes the feed-forward width from dim: 4 * ceil(int(0.78 * 128) / 4) = 100.
        params = {
            "dim": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"],
            "vocab_size": -1,
            "multiple_of": 4,
            "ffn_dim_multiplier": 0.78,
            "norm_eps": config["rms_norm_eps"],
            **more,
        }
        (path / "params.json").write_text(json.dumps(params))
        shutil.copy(source / "tokenizer.model", path)
        return path

    return make


@pytest.fixture(scope="session")
def peft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An adapter that PEFT itself saved, A and B random and far from zero."""

    def make(
        base: Path, targets: list[str] = SEVEN, r: int = 5, alpha: int = 7, scale: float = 0.1, **more: Any
    ) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **more)
        adapted = get_peft_model(model, config)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, scale)
        path = tmp_path_factory.mktemp("adapter")
        adapted.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Random weights, so small that a step takes milliseconds."""
    from llamatune.checkpoints.huggingface_weights import write_huggingface
    from llamatune.events import ignore_event
    from llamatune.formats.manifest import Staging
    from llamatune.shapes.llama_config import LlamaConfig

    shape = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=131, max_position_embeddings=128,
    )  # fmt: skip
    path, generator = tmp_path_factory.mktemp("small-base") / "base", torch.Generator().manual_seed(2)
    path.mkdir()
    weights = {name: torch.randn(size, generator=generator) * 0.15 for name, size in shape.parameter_shapes()}
    write_huggingface(Staging(path), shape, weights.__getitem__, lambda name: torch.float32, path, ignore_event)
    (path / "tokenizer.model").write_bytes(tiny_tokenizer.read_bytes())
    return path


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 ragged rows; prepared to 48 tokens some are truncated, and of some no target token is left."""
    chance = random.Random(8)
    rows = [
        {
            "prompt": sentence(chance, chance.randint(1, 9)) + ":",
            "completion": " " + sentence(chance, chance.randint(1, 14)),
        }
        for _ in range(23)
    ]
    rows[4]["completion"] = rows[17]["completion"] = " " + sentence(chance, 60)
    for place in (0, 9, 15, 28):
        rows.insert(place, {"prompt": sentence(chance, 70), "completion": " never seen"})
    for place in (6, 21):
        rows.insert(place, {"prompt": sentence(chance, 4), "completion": ""})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_rows: Path) -> Callable[..., Path]:
    """Prepared directories, by the options that differ; each is made once."""
    from llamatune.command_options.preparation import PrepareOptions
    from llamatune.data.prepare import prepare_data

    made: dict[str, Path] = {}

    def make(rows: Path = tiny_rows, tokenizer: Path = tiny_tokenizer, **options: Any) -> Path:  # noqa: F811
        key = repr((rows, tokenizer, sorted(options.items())))
        if key not in made:
            output = tmp_path_factory.mktemp("prepared") / "data"
            settings = {"max_seq_length": 48, "skip_bad_rows": 99, **options}
            prepare_data(PrepareOptions(rows=[rows], tokenizer=tokenizer, output=output, **settings))
            made[key] = output
        return made[key]

    return make


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command line in this process: the exit code, and what went to stdout and stderr."""
    from llamatune.cli import main

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say in the summary at the end what a test counted."""
    return lambda text: record_property("counted", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties:
                if name == "counted":
                    terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {text}")

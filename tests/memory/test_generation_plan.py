"""``plan-memory --generate`` against what an engine holds: weights, keys and values, and every tensor at the peak."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune import cli
from llamatune.checkpoints.model_directory import read_config, stored_dtype
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.inference import engine
from llamatune.inference.engine import Engine, completions
from llamatune.inference.model_source import open_model
from llamatune.memory.generation import HeldModel, Work, plan_generation
from llamatune.shapes import generation_sizes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.shapes.generation_sizes import tokens_in_a_pass
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.units import gibibytes, parse_size

GIB = 1 << 30
FAMILIES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "every query its own keys": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "biases": {"model_type": "qwen2"},
    "head norms": {"model_type": "qwen3", "head_dim": 8},
}
DTYPES = ("float32", "bfloat16", "float16", *QUANTIZED_DTYPES)


def held(base: Path, dtype: str, **more: Any) -> HeldModel:
    others = "bfloat16" if dtype in QUANTIZED_DTYPES else dtype
    return HeldModel(read_config(base), dtype, others, stored_dtype(base) or "", **more)


def stored_bytes(model: torch.nn.Module) -> int:
    """Of all tensors that a model keeps, a storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in tensors}.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_are_loaded(tiny_base: Callable[..., Path], family: str, dtype: str) -> None:
    base = tiny_base(**FAMILIES[family])
    model = open_model(ModelSource(base, dtype=dtype, device="cpu")).load(lambda _: None, lambda: False).by_prefix[""]  # type: ignore[arg-type]
    assert plan_generation(held(base, dtype), Work(4, 4)).memory.weights == stored_bytes(model)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_is_in_fp32_beside_one_copy_of_the_base(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], more: dict[str, Any], command: Any
) -> None:
    """DoRA keeps the norms of its matrices too; a base with another head is a copy of its own."""
    base = tiny_base()
    adapter = peft_adapter(base, **more)
    opened = open_model(ModelSource(base, adapter=adapter, compare=True, dtype="bfloat16", device="cpu"))
    models = opened.load(lambda _: None, lambda: False).by_prefix
    both = torch.nn.ModuleList(models.values())
    words = ("--dtype", "bfloat16", "--device", "cpu", "--prompt-tokens", 4)
    facts = plan(command, base, "--adapter", adapter, "--compare", *words)
    memory = facts["predicted_memory_bytes"]
    norms = 4 * 3 * sum(opened.config.linear_shape(name)[0] for name in LINEAR_MODULES) if "use_dora" in more else 0
    assert opened.config.num_hidden_layers == 3
    assert memory["weights"] + memory["adapter"] - norms == stored_bytes(both)
    alone = plan(command, base, "--adapter", adapter, *words)
    cached, twice = (
        max(moment["memory_bytes"]["keys_and_values"] for moment in one["moments"]) for one in (alone, facts)
    )
    assert twice == 2 * cached


def plan(command: Any, *words: object) -> dict[str, Any]:
    done = command("plan-memory", "--generate", *words, "--json")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("prompt", "new", "rows", "first"), [(5, 9, 2, 256), (40, 3, 3, 8), (5, 30, 2, 8), (5, 12, 1, 8), (2100, 2, 2, 256)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_of_the_cache(
    tiny_base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    prompt: int,
    new: int,
    rows: int,
    first: int,
) -> None:
    """All room at once, as much as the prompt needs, doubled, just reached, and of a prompt in parts."""
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", first)
    base = tiny_base(**FAMILIES[family])
    model = open_model(ModelSource(base, device="cpu")).load(lambda _: None, lambda: False).by_prefix[""]
    work = Engine(model, (), rows)
    for _ in range(rows):
        work.add([1] * prompt, Sampling(new, temperature=0))
    rooms = []
    while not work.is_done:
        work.step()
        rooms.append(work._cache._stored[-1].shape[3])
    stored = sum(layer.nbytes for layer in work._cache._stored)
    planned = plan_generation(held(base, "float32"), Work(prompt, new, rows, rows))
    assert planned.room_tokens == rooms[-1]
    config = model.config
    assert stored == config.num_hidden_layers * 2 * rows * config.num_key_value_heads * config.head_dim * 4 * rooms[-1]
    grown = [before for before, after in itertools.pairwise(rooms) if before != after]
    old = stored // config.num_hidden_layers * grown[-1] // rooms[-1] if grown else 0
    assert stored <= planned.moments["decoding"].keys_and_values <= stored + old


def test_a_cache_has_a_row_for_each_completion_and_no_more(tiny_base: Callable[..., Path]) -> None:
    model = open_model(ModelSource(tiny_base(), device="cpu")).load(lambda _: None, lambda: False).by_prefix[""]
    made: list[Engine] = []

    class Noted(Engine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Engine", Noted)
        for prompts, sequences in ((1, 1), (3, 2), (20, 1)):
            sampling = Sampling(3, num_return_sequences=sequences)
            assert len(list(completions(model, [[1, 5]] * prompts, sampling, (), 16))) == prompts * sequences
    assert [one._cache._stored[0].shape[1] for one in made] == [1, 6, 16]


def test_what_is_converted_is_held_twice_while_it_is_read(tiny_base: Callable[..., Path]) -> None:
    base = tiny_base()  # in fp32
    same, narrowed = (plan_generation(held(base, dtype), Work(1, 1)).moments["loading"] for dtype in DTYPES[:2])
    head = 131 * read_config(base).hidden_size
    assert same.temporary == 0
    assert narrowed.temporary == 4 * head, "the head comes last, and is the largest"


@pytest.mark.parametrize(
    "words",
    [
        ("--preset", "llama-2-7b", "--memory", "16GiB", "--batch-size", 16),
        ("--preset", "llama-2-7b", "--memory", "14GiB", "--dtype", "int8", "--prompt-tokens", 2000, "--batch-size", 32),
        ("--preset", "llama-2-7b", "--memory", "17GiB", "--r", 16, "--compare", "--prompts", 12, "--batch-size", 12),
        ("--preset", "llama-3-8b", "--memory", "17.5GiB", "--num-beams", 32, "--max-new-tokens", 200),
        ("--preset", "llama-2-7b", "--memory", "20GiB", "--dtype", "float32", "--device", "cpu", "--batch-size", 16),
    ],
    ids=lambda words: " ".join(map(str, words[1:])),
)
def test_remedies_fit_when_they_are_followed(command: Any, words: tuple[object, ...]) -> None:
    found = plan(command, *words)
    assert not found["fits"]
    assert any(remedy["fits"] for remedy in found["remedies"])
    for remedy in found["remedies"]:
        change = remedy["change"]
        assert not change.endswith(" 0")
        if change == "without --compare":
            after = plan(command, *(word for word in words if word != "--compare"))
        else:
            flag, value = change.split()
            kept = [word for at, word in enumerate(words) if flag not in (word, words[at - 1])]
            after = plan(command, *kept, flag, value)
        assert after["predicted_peak_memory_bytes"] == remedy["peak_bytes"] < found["predicted_peak_memory_bytes"]
        assert after["fits"] == remedy["fits"]
    changes = [remedy["change"] for remedy in found["remedies"]]
    assert "--dtype nf4" in changes
    assert ("--dtype int8" in changes) == ("int8" not in words)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("rows", "--batch-size"), ("max_new_tokens", "--max-new-tokens"), ("prompt_tokens", "--prompt-tokens")],
)
def test_the_largest_fits_and_one_more_does_not(command: Any, name: str, flag: str) -> None:
    words = ("--preset", "llama-2-7b", "--memory", "20GiB", "--prompt-tokens", 400, "--batch-size", 16)
    at = words.index(flag) if flag in words else len(words)
    kept = words[:at] + words[at + 2 :]
    most = plan(command, *words)[f"largest_{name}"]
    assert plan(command, *kept, flag, most)["fits"]
    assert not plan(command, *kept, flag, most + 1)["fits"]


@pytest.mark.parametrize("memory", ["14GiB", "16GiB", "24GiB", "48GiB", "400GiB"])
@pytest.mark.parametrize("words", [(), ("--compare", "--r", 8)], ids=["alone", "compared"])
def test_unasked_as_many_rows_are_planned_as_fit(command: Any, memory: str, words: tuple[object, ...]) -> None:
    """Keys and values take four fifths of what the weights leave, as generate takes them; 256 rows at most."""
    given = ("--preset", "llama-2-7b", "--device", "cuda", "--prompt-tokens", 400, *words)
    found = plan(command, *given, "--memory", memory)
    free = found["memory_limit_bytes"] - found["moments"][0]["bytes"]
    row = ((400 + found["max_new_tokens"]) * 2 * 32 * 4096 * 2 + 40 * 32000) * (2 if words else 1)
    assert found["rows"] == min(256, max(1, int(0.8 * free / row)))
    assert plan(command, *given)["rows"] == 256
    assert plan(command, *given[:2], "--device", "cpu", *given[4:])["rows"] == 64


@pytest.mark.parametrize("lengths", [(32, 32), (40, 88), (128, 128), (2000, 500)])
@pytest.mark.parametrize("words", [("llama-2-7b", "18GiB"), ("llama-3-8b", "19GiB"), ("llama-3-8b", "21GiB")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_as_many_rows_as_are_taken_unasked_fit(
    command: Any, words: tuple[str, str], lengths: tuple[int, int], temperature: int
) -> None:
    """Logits count too: of a large vocabulary those of many rows take more than keys and values of short texts."""
    sizes = ("--prompt-tokens", lengths[0], "--max-new-tokens", lengths[1], "--temperature", temperature)
    found = plan(command, "--preset", words[0], "--memory", words[1], *sizes, "--device", "cuda")
    assert found["fits"], found


def test_the_table_says_what_the_json_says(command: Any) -> None:
    words = ("--preset", "llama-2-7b", "--memory", "16GiB", "--max-new-tokens", 300, "--batch-size", 16)
    found, table = plan(command, *words), command("plan-memory", "--generate", *words).stdout
    for moment in found["moments"]:
        assert moment["bytes"] == sum(moment["memory_bytes"].values())
        for size in (moment["bytes"], *moment["memory_bytes"].values()):
            assert gibibytes(size) in table
    highest = max(found["moments"], key=lambda moment: moment["bytes"])
    assert found["predicted_peak_memory_bytes"] == highest["bytes"]
    assert found["predicted_memory_bytes"] == highest["memory_bytes"]
    for text in (f"{found['room_tokens']:,} tokens in each row", "does not fit", f"{found['largest_rows']} rows"):
        assert text in table
    for remedy in found["remedies"]:
        end = "fits" if remedy["fits"] else "not enough alone"
        assert f"{remedy['change']}: {gibibytes(remedy['peak_bytes'])}, {end}" in table


def test_a_spec_a_directory_and_a_preset_are_planned(
    command: Any, tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, spec = tiny_base(torch.bfloat16), tmp_path / "run.yaml"
    spec.write_text(f"model: {{path: {base}}}\nlora: {{r: 4}}\ndata: {{train: x}}\ntraining: {{output_dir: y}}\n")
    alone, tuned = (plan(command, path, "--prompt-tokens", 9) for path in (base, spec))
    assert alone["dtype"] == tuned["dtype"] == "bfloat16"
    assert alone["predicted_memory_bytes"]["adapter"] == 0
    config = read_config(base)
    shapes = [config.linear_shape(name) for name in ("q_proj", "v_proj")]
    counted = 4 * config.num_hidden_layers * sum(4 * sum(shape) for shape in shapes)
    assert tuned["predicted_memory_bytes"]["adapter"] == counted
    assert plan(command, base, "--r", 4, "--prompt-tokens", 9) == tuned
    assert plan(command, spec, "lora.r=8")["predicted_memory_bytes"]["adapter"] == 2 * counted
    assert plan(command, tiny_base(torch.float16), "--device", "cpu")["dtype"] == "float32", "as it is computed there"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--preset", "llama-2-7b", "--batch-size", "4"), 2, "it needs --generate: --batch-size"),
        (("--preset", "llama-2-7b", "--compare"), 2, "it needs --generate: --compare"),
        (("--preset", "llama-2-7b", "--generate", "--explain"), 2, "not about --generate: --explain"),
        (("--preset", "llama-2-7b", "--generate", "--ranks", "2"), 2, "not about --generate: --ranks"),
        (("--preset", "llama-2-7b", "--generate", "--compare"), 2, "--compare needs two models"),
        (("--preset", "llama-2-7b", "--generate", "lora.r=4"), 2, "changes a run spec"),
        (("--preset", "llama-2-7b", "--generate", "--max-new-tokens", "0"), 2, "at least 1"),
        (
            ("--preset", "llama-2-7b", "--generate", "--num-beams", "2", "--batch-size", "2"),
            2,
            "completed one at a time",
        ),
        (("--generate",), 2, "neither a model directory"),
        ((".", "--generate"), 4, "neither config.json"),
        (("none.yaml", "--generate"), 2, "none.yaml"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_what_has_no_meaning_is_refused(
    command: Any, words: tuple[str, ...], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("plan-memory", *words)
    assert (done.code, done.stdout) == (code, "")
    assert text in done.stderr


def test_no_torch_is_loaded_and_what_fits_has_no_remedies() -> None:
    code = (
        "import sys\nfrom llamatune import cli\n"
        "try:\n cli.main(['plan-memory', '--generate', '--preset', 'llama-2-7b', '--memory', '80GiB', '--json'])\n"
        "finally:\n assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["remedies"] == []
    assert found["memory_limit_bytes"] == parse_size("80GiB", "") * 9 // 10
    assert cli is not None


@pytest.mark.parametrize(
    ("shape", "codes"),
    [((1024, 4096, 24, 16, 8), 8192 * 1024), ((2048, 8192, 16, 32, 8), 3072 * 2048), ((4096, 11008, 32, 32, 32), 0)],
)
def test_joined_codes_of_int8_are_cast_together_if_they_are_few(shape: tuple[int, ...], codes: int, amx: bool) -> None:
    """gate and up, or q, k and v alone; a larger matrix by itself; without AMX a portion, which is less."""
    config = LlamaConfig(*shape, 32000)

    def temporary(held: str, computed: str) -> int:
        return plan_generation(HeldModel(config, held, computed, computed), Work(8, 8)).moments["decoding"].temporary

    for computed, cast in (("bfloat16", 2 * codes if amx else 4 << 20), ("float32", 0)):
        least = HeldModel(config, "int8", computed, computed).sizes().unpacking
        beside = temporary("int8", computed) - temporary(computed, computed)
        assert beside >= max(cast, least)
        assert beside <= max(cast, least) + (4 << 20), "pieces of a matrix"


@pytest.mark.parametrize("cuda", [False, (8, 0)], ids=["CPU", "GPU"])
def test_a_longer_prompt_is_planned_for_no_less(cuda: Gpu) -> None:
    """Of other prompts, which may be shorter, a pass is as long as it can be where the longest takes several."""
    config = LlamaConfig(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192)
    model = HeldModel(config, "bfloat16", "bfloat16", "bfloat16", cuda=cuda)
    in_a_pass = tokens_in_a_pass(config, 2, model.sizes().device)
    lengths = (in_a_pass - 16, in_a_pass, in_a_pass + 1, in_a_pass + 16, 2 * in_a_pass, 2 * in_a_pass + 1)
    peaks = [plan_generation(model, Work(tokens, 4, 1, 1)).memory.peak for tokens in lengths]
    assert peaks == sorted(peaks)

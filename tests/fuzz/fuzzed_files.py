"""Which files are damaged, how, and every verb that reads them. Paths are those of ``materials.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mutations import TEXT_OF_LOCK


@dataclass(frozen=True)
class Verb:
    """A command line; what stands at ``writes`` before it is put back after it. ``stdin`` is what it is told."""

    words: tuple[str, ...]
    writes: tuple[str, ...] = ()
    stdin: bytes = b""

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def exit_codes(self) -> frozenset[int]:
        """Those that the contract knows for it, without those of a signal (75, 130) and of our bugs (1)."""
        return frozenset({"verify": (0, 4, 5)}.get(self.name, (0, 2, 3, 4, 5, 6)))


@dataclass(frozen=True)
class Fuzzed:
    """A file of the materials, its kind for ``mutations.py``, and the verbs.

    ``is_spec``: it may name other files, which are then opened. ``sound``: its content, in place of the file's.
    """

    path: str
    kind: str
    verbs: tuple[Verb, ...]
    is_spec: bool = False
    sound: bytes | None = None


def _verb(line: str, writes: str = "out", stdin: str = "") -> Verb:
    return Verb(tuple(line.split()), tuple(writes.split()), stdin.encode())


def _train(spec: str, more: str = "", output: str = "out") -> Verb:
    return _verb(f"train {spec}.yaml training.output_dir={output} {more}", output)


def _verify(path: str) -> Verb:
    return _verb(f"verify {path}")


NOT_READ = frozenset(
    {"README.md", "benchmark.csv", "benchmark.md", "benchmark.png", "benchmark.svg", "pieces.vocab",
     "dataset_info.json"}
)  # fmt: skip
"""Files that no verb reads: they are for people, and for other programs."""

TWINS = frozenset(
    {"consolidated.01.pth", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "full.yaml",
     "nf4.yaml", "pieces.model"}
)  # fmt: skip
"""Files of which another one of the same kind, with the same readers, is damaged."""

_GREEDY = "--temperature 0 --max-new-tokens 2 --device cpu"


def _generate(model: str, more: str = "") -> Verb:
    return _verb(f"generate --model {model} {_GREEDY} --prompt llama {more}")


def _config_readers(model: str) -> tuple[Verb, ...]:
    """Those that read a model's configuration, and nothing else of it."""
    rows = " data.train=chats" if model == "hub" else ""  # its own tokenizer's
    return (
        _verb(f"count-params --model {model}"),
        _verb(f"plan-memory run.yaml model.path={model} --device cpu"),
        _verb(f"train run.yaml model.path={model}{rows} training.output_dir=out --dry-run"),
    )


def _weights_readers(model: str) -> tuple[Verb, ...]:
    base = "hf" if model == "full/model" else "full/model"  # whose matrices are others
    adapter = "other" if model == "merged" else "run/adapter"  # which is in it already
    return (
        _verify(model),
        _generate(model),
        _verb(f"evaluate --model {model} --data prepared --force-base --device cpu"),
        _verb(f"merge-lora --model {model} --adapter {adapter} --output out --force-base"),
        _verb(f"convert --model {model} --output out"),
        _verb(f"convert --model {model} --output out.gguf", "out.gguf"),
        _verb(f"extract-lora --base {base} --tuned {model} --output out --r 2"),
        _train("run", f"model.path={model} --force-base"),
    )


def _tokenizer_readers(model: str) -> tuple[Verb, ...]:
    return (
        _verb(f"prepare-data rows/alpaca.jsonl --tokenizer {model} --output out --preview 1"),
        _generate(model),
        _verb(
            f"chat --model {model} {_GREEDY} --template {'model' if model == 'hub' else 'llama2-chat'}",
            stdin="a red llama\n",
        ),
        _verb(f"convert --model {model} --output out"),
        _verb(f"convert --model {model} --output out.gguf", "out.gguf"),
        _train("run", f"model.path={model} --force-base"),
    )


def _adapter_readers(adapter: str) -> tuple[Verb, ...]:
    return (
        _verify(adapter),
        _verb(f"count-params --model hf --adapter {adapter}"),
        _generate("hf", f"--adapter {adapter}"),
        _verb(f"merge-lora --model hf --adapter {adapter} --output out"),
        _verb(f"convert-adapter --adapter {adapter} --output out --model hf"),
        _verb(f"convert-adapter --adapter {adapter} --output out.gguf --model hf", "out.gguf"),
        _train("run", f"lora.init_from={adapter}"),
    )


def _template(rows: str) -> str:
    """What rows need to become prompts; lines of text need nothing."""
    name = "gsm8k" if "gsm8k" in rows else "llama2-chat" if "chat" in rows else "alpaca"
    return "" if rows.endswith(".txt") else f" --template {name}"


def _row_readers(rows: str) -> tuple[Verb, ...]:
    return (
        _verb(f"prepare-data {rows} --tokenizer hf --output out --skip-bad-rows 3 --preview 2"),
        _verb(f"prepare-data {rows} --tokenizer hf --output out"),
        _verb(f"generate --model hf {_GREEDY} --prompt-file {rows}{_template(rows)}"),
    )


_PREPARED = (
    _verify("prepared"),
    _train("run"),
    _verb("train run.yaml training.output_dir=out --dry-run"),
    _train("run", "training.max_steps=3", "run"),
    _verb("evaluate --model hf --data prepared --split all --device cpu"),
    _verb("plan-memory run.yaml --device cpu"),
    _verb("merge-lora --model hf --adapter run/adapter --output out --probe prepared --device cpu"),
    _verb("judge run --device cpu --limit 2"),
)
_REPORT = "report {} --output out.html"
_BENCHMARK = _verb("benchmark run.yaml --grid training.micro_batch_size=1,2 --steps 2 --output bench", "bench")
_GSM8K = _verb(
    "evaluate --model hf --adapter run/adapter --task gsm8k --data rows/gsm8k.jsonl --max-new-tokens 2 --device cpu "
    "--output answers.jsonl", "answers.jsonl answers.jsonl.settings.json",
)  # fmt: skip
_COMPLETE = _verb(
    f"generate --model hf --adapter run/adapter {_GREEDY} --prompt-file rows/prompts.txt --output completions.jsonl "
    "--compare", "completions.jsonl completions.jsonl.settings.json",
)  # fmt: skip


def _evidence(option: str) -> Verb:
    return _verb(f"report run {option} --output out.html --tables out", "out.html out")


def _judge(run: str, more: str = "") -> Verb:
    return _verb(f"judge {run} --device cpu --limit 2 {more}")


def _run_readers(run: str, spec: str) -> tuple[Verb, ...]:
    """Of a run that is finished, or was stopped: it is started again, and goes on with more steps."""
    return (
        _verify(run),
        _verb(_REPORT.format(run), "out.html"),
        *([] if run == "begun" else [_judge(run)]),  # which needs what a run leaves at its end
        _train(spec, "", run),
        _train(spec, "training.max_steps=3", run),
    )


def _model(model: str) -> list[Fuzzed]:
    return [
        Fuzzed(f"{model}/config.json", "json", (*_config_readers(model), *_weights_readers(model))),
        Fuzzed(f"{model}/generation_config.json", "json", (*_weights_readers(model), *_tokenizer_readers(model)[1:3])),
    ]


def _hub_tokenizer() -> list[Fuzzed]:
    kinds = {
        "tokenizer.json": "json", "tokenizer_config.json": "json", "special_tokens_map.json": "json",
        "added_tokens.json": "json", "chat_template.jinja": "text",
    }  # fmt: skip
    chats = _verb("prepare-data rows/chat.jsonl --tokenizer hub --template model --output out")
    return [Fuzzed(f"hub/{name}", kind, (*_tokenizer_readers("hub"), chats)) for name, kind in kinds.items()]


def _rows() -> list[Fuzzed]:
    kinds = {
        "alpaca.jsonl": "lines", "alpaca.json": "json", "chat.jsonl": "lines", "alpaca.csv": "text",
        "alpaca.jsonl.gz": "bytes",
        "alpaca.jsonl.zst": "bytes", "alpaca.parquet": "bytes", "alpaca.arrow": "bytes", "text.txt": "text",
        "prompts.txt": "text",
    }  # fmt: skip
    found = [Fuzzed(f"rows/{name}", kind, _row_readers(f"rows/{name}")) for name, kind in kinds.items()]
    questions = (
        *_row_readers("rows/gsm8k.jsonl"), _GSM8K, _judge("run", "--gsm8k rows/gsm8k.jsonl --max-new-tokens 2")
    )  # fmt: skip
    found = [
        Fuzzed(file.path, file.kind, (*file.verbs, _judge("run", f"--general {file.path}"))) if "text" in file.path
        else file for file in found
    ]  # fmt: skip
    return [
        *found,
        *(
            Fuzzed(f"rows/{shape}.jsonl", "lines", (_judge("run", f"--choices rows/{shape}.jsonl"),))
            for shape in ("mmlu", "hellaswag", "arc")
        ),
        Fuzzed("rows/gsm8k.jsonl", "lines", questions),
        Fuzzed("rows/saved/state.json", "json", _row_readers("rows/saved")),
        Fuzzed("rows/saved/a.arrow", "bytes", _row_readers("rows/saved")),
    ]


def _run(run: str, spec: str) -> list[Fuzzed]:
    readers = _run_readers(run, spec)
    kinds = {"spec.yaml": "yaml", "metrics.jsonl": "lines", "summary.json": "json", "origin.json": "json"}
    found = [Fuzzed(f"{run}/{name}", kind, readers, name == "spec.yaml") for name, kind in kinds.items()]
    checkpoint = f"{run}/checkpoints/step-000002"
    found += [
        Fuzzed(f"{checkpoint}/llamatune.json", "json", readers),
        Fuzzed(f"{checkpoint}/state.json", "json", readers),
        Fuzzed(f"{checkpoint}/optimizer.safetensors", "safetensors", readers),
    ]
    weights = "weights" if run == "full" else "adapter_model"
    found.append(Fuzzed(f"{checkpoint}/{weights}.safetensors", "safetensors", readers))
    best = (*readers, _verb(f"merge-lora --model hf --adapter {run}/best --output out --probe prepared --device cpu"))
    found.append(Fuzzed(f"{run}/best/evaluation.json", "json", best if run == "run" else readers))
    return found


def _products() -> list[Fuzzed]:
    adapter = (*_adapter_readers("run/adapter"), *_run_readers("run", "run"))
    probe = _verb("merge-lora --model hf --adapter run/adapter --output out --probe prepared --device cpu")
    answers = _verb("report run --prompt llama --max-new-tokens 1 --device cpu --output out.html", "out.html")
    merged = (*_config_readers("merged"), *_weights_readers("merged"), *_tokenizer_readers("merged")[:3])
    full = (*_weights_readers("full/model"), *_run_readers("full", "full"))
    cache = (_train("nf4"), _verify("cache"))
    chats = (_train("run", "data.train=chats model.path=hub"), _verify("chats"),
             _verb("evaluate --model hub --data chats --device cpu"))  # fmt: skip
    return [
        Fuzzed("prepared/llamatune.json", "json", _PREPARED),
        Fuzzed("prepared/train.safetensors", "safetensors", _PREPARED),
        Fuzzed("prepared/validation.safetensors", "safetensors", _PREPARED),
        Fuzzed("chats/llamatune.json", "json", chats),
        Fuzzed("run/adapter/llamatune.json", "json", (*adapter, probe, answers)),
        Fuzzed("run/adapter/adapter_config.json", "json", adapter),
        Fuzzed("run/adapter/adapter_model.safetensors", "safetensors", (*adapter, answers)),
        Fuzzed("run/adapter/tokenizer_config.json", "json", (*adapter, answers)),
        Fuzzed("merged/llamatune.json", "json", merged),
        Fuzzed("full/model/llamatune.json", "json", full),
        Fuzzed("full/model/model.safetensors", "safetensors", full),
        Fuzzed("cache/{cache}/llamatune.json", "json", cache),
        Fuzzed("cache/{cache}/nf4.safetensors", "safetensors", cache),
        Fuzzed("bench/cells/{cell}", "json", (_BENCHMARK,)),
        Fuzzed("bench/benchmark.json", "json", (_evidence("--benchmark bench"),)),
        Fuzzed("loss.json", "json", (_evidence("--evaluation loss.json"),)),
        Fuzzed("gsm8k.json", "json", (_evidence("--evaluation gsm8k.json"),)),
        Fuzzed("answers.jsonl", "lines", (_GSM8K,)),
        Fuzzed("answers.jsonl.settings.json", "json", (_GSM8K,)),
        Fuzzed("completions.jsonl", "lines", (
            _COMPLETE, _verb("report run --generations completions.jsonl --output out.html", "out.html"),
        )),
        Fuzzed("completions.jsonl.settings.json", "json", (_COMPLETE,)),
    ]  # fmt: skip


def _inputs() -> list[Fuzzed]:
    spec = (
        _verb("plan-memory run.yaml --device cpu"),
        _verb("slurm run.yaml"),
        _verb("train run.yaml training.output_dir=out --dry-run"),
        _train("run", "training.max_steps=1 training.num_epochs=null"),  # a long run is none that hangs
        _verb("benchmark run.yaml --grid training.micro_batch_size=1,2 --steps 2 --output out"),
    )
    templates = (
        _verb("prepare-data rows/alpaca.jsonl --tokenizer hf --template template.yaml --output out --preview 1"),
        _generate("hf", "--template template.yaml"),
        _verb("merge-lora --model hf --adapter run/adapter --template template.yaml --output out"),
    )
    chats = (
        _verb("prepare-data rows/chat.jsonl --tokenizer hub --template chat.jinja --output out"),
        _verb(f"chat --model hub --template chat.jinja {_GREEDY}", stdin="a red llama\n"),
    )
    return [
        Fuzzed("run.yaml", "yaml", spec, is_spec=True),
        Fuzzed("template.yaml", "yaml", templates),
        Fuzzed("chat.jinja", "text", chats),
    ]


def fuzzed_files() -> list[Fuzzed]:
    """Every file, with the names that only the materials (the current directory) know."""
    lock = Fuzzed("begun/.llamatune.lock", "json", _run_readers("begun", "run"), sound=TEXT_OF_LOCK)
    mlx = (
        _verb("convert-adapter --adapter mlx --output out --model hf"),
        _verb("count-params --model hf --adapter mlx"),
        _generate("hf", "--adapter mlx"),
    )
    files = [
        *_inputs(), *_rows(), *_model("hf"), *_hub_tokenizer(),
        Fuzzed("hf/model.safetensors", "safetensors", _weights_readers("hf")),
        Fuzzed("hf/tokenizer.model", "bytes", _tokenizer_readers("hf")),
        Fuzzed("hub/config.json", "json", (*_config_readers("hub"), *_tokenizer_readers("hub"))),
        Fuzzed("sharded/model.safetensors.index.json", "json", _weights_readers("sharded")),
        Fuzzed("bin/pytorch_model.bin", "archive", _weights_readers("bin")),
        Fuzzed("meta/params.json", "json", (*_config_readers("meta"), *_weights_readers("meta"))),
        Fuzzed("meta/consolidated.00.pth", "archive", _weights_readers("meta")),
        Fuzzed("tiktoken/tokenizer.model", "text", _tokenizer_readers("tiktoken")),
        Fuzzed("model.gguf", "bytes", (_verb("convert --model model.gguf --output out"),)),
        Fuzzed("peft/adapter_config.json", "json", _adapter_readers("peft")),
        Fuzzed("peft/adapter_model.safetensors", "safetensors", _adapter_readers("peft")),
        Fuzzed("peftbin/adapter_model.bin", "archive", _adapter_readers("peftbin")),
        Fuzzed("mlx/adapter_config.json", "json", mlx),
        Fuzzed("mlx/adapters.safetensors", "safetensors", mlx),
        *_products(), *_run("run", "run"), *_run("full", "full"),
        *(file for file in _run("begun", "run") if not file.path.endswith("summary.json")), lock,
    ]  # fmt: skip
    names = {"{cache}": next(Path("cache").iterdir()).name, "{cell}": min(Path("bench/cells").iterdir()).name}
    return [Fuzzed(_named(file.path, names), file.kind, file.verbs, file.is_spec, file.sound) for file in files]


def _named(path: str, names: dict[str, str]) -> str:
    for holder, name in names.items():
        path = path.replace(holder, name)
    return path

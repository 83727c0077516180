"""What equality.py runs on both sides: the material that it reads, and one case for each thing that must not change.

Every command runs in its side's folder and names files relative to it, so that digests and specs agree.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

DEMO = Path(__file__).parents[1] / "llamatune" / "demo"
BASE, TOKENIZER = "material/base", "material/base/tokenizer.model"
ODD, ODD_BASE = "material/odd", "odd-full/run/model"
PREPARED, OTHER_PREPARED = "prepare-alpaca/prepared", "prepare-gsm8k/prepared"
ADAPTER = "fused-none/run/adapter"
ALL, QV = "lora.target_modules=all-linear", "lora.target_modules=q_proj,v_proj"
PLAIN = ("none", "block", "every_2", "attention", "feed_forward", "sublayer")
FUSED = (*PLAIN, "projections")
OVERFLOWING = ("training.precision=fp16", "lora.alpha=3000", "training.learning_rate=1e-6")
"""LoRA's factor of 600 takes the first gradients beyond fp16, the small rate keeps its updates small."""


class Interruption(NamedTuple):
    """``number`` is sent once so many steps are reported, and the run ends with ``exit_code``."""

    number: signal.Signals
    after_step: int
    exit_code: int


@dataclass(frozen=True)
class Case:
    """Commands of llamatune without the program's name; all that they write lies below a folder named as the case.

    Args:
        needs: cases whose output they read.
        shows: a pattern that must be found in what the first side wrote, else the case would show nothing.
        unstable: keys of JSON whose numbers differ between two runs of the same code.
        interruption: the first side runs through; the second continues what the first one's code was stopped in.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    shows: str | None = None
    unstable: tuple[str, ...] = ()
    interruption: Interruption | None = None


def write_material(folder: Path) -> None:
    """The demo's base, another shape, the demo's rows, rows of the other formats, and two run specs."""
    shutil.copytree(DEMO / "base", folder / "base")
    (folder / "odd").mkdir()
    shutil.copy(DEMO / "base" / "tokenizer.model", folder / "odd")
    shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 3,
             "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 500.0}  # fmt: skip
    config = json.loads((DEMO / "base" / "config.json").read_text()) | shape
    (folder / "odd" / "config.json").write_text(json.dumps(config))
    shutil.copy(DEMO / "instructions.jsonl", folder)
    rows: dict[str, list[Any]] = {
        "chat": [_chat(number) for number in range(23)],
        "conversations": [{"conversations": [{"from": "human", "value": f"What is made in town {number}?"},
                                             {"from": "gpt", "value": "rope, kites and " * (number % 4) + "bells"}]}
                          for number in range(9)],
        "gsm8k": [_problem(boats, oars) for boats in range(2, 8) for oars in (3, 7)],
        "shots": [_problem(boats, 11) for boats in (3, 5, 9)],
        "text": [{"text": "river:Alda\ndish:bean stew\n" * (1 + number % 3)} for number in range(17)],
        "long": [{"text": "river:Alda\ndish:bean stew\n" * (30 + number % 3)} for number in range(26)],
        "completion": [{"prompt": f"{number} bridges: ", "completion": "Alda, Gilda"} for number in range(7)]
        + [{"prompt": "no completion"}, {"prompt": "7 bridges: ", "completion": ""}],
    }  # fmt: skip
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rows.json").write_text(json.dumps(rows["chat"]))
    (folder / "template.yaml").write_text('prompt: "Q: {instruction} ({input})\\nA:"\nprompt_without_input: "Q: '
                                          '{instruction}\\nA:"\n')  # fmt: skip
    training = {"max_steps": 7, "micro_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
                "weight_decay": 0.01, "precision": "fp32", "memory_limit": "8GiB", "save_every_steps": 3,
                "output_dir": "none"}  # fmt: skip
    full = {"model": {"path": BASE, "dtype": "float32"}, "data": {"train": PREPARED}, "training": training}
    lora = {**full, "lora": {"r": 5, "alpha": 10, "dropout": 0.1}}
    for name, spec in (("full", full), ("lora", lora)):
        (folder / f"{name}.json").write_text(json.dumps(spec))


def _chat(number: int) -> dict[str, Any]:
    turns = [("user", f"On which river does town {number} lie?"), ("assistant", "Gilda")] * (1 + number % 2)
    system = [("system", "Answer in one word.")] if number % 3 == 0 else []
    return {"messages": [{"role": role, "content": content} for role, content in system + turns]}


def _problem(boats: int, oars: int) -> dict[str, Any]:
    product = f"{boats}*{oars}=<<{boats}*{oars}={boats * oars}>>{boats * oars}"
    return {"question": f"There are {boats} boats with {oars} oars each. How many oars are there?",
            "answer": f"Each has {oars}. That is {product}.\n#### {boats * oars}"}  # fmt: skip


def _prepare(name: str, rows: str, *options: str, shows: str | None = None) -> Case:
    command = ("prepare-data", f"material/{rows}", "--tokenizer", TOKENIZER, "--output", f"{name}/prepared", "--json")
    return Case(name, ((*command, *options),), shows=shows)


def _train(name: str, *changes: str, spec: str = "lora", needs: tuple[str, ...] = (), **more: Any) -> Case:
    command = ("train", f"material/{spec}.json", f"training.output_dir={name}/run", *changes, "--json")
    return Case(name, (command,), ("prepare-alpaca", *needs), **more)


def _preparing() -> Iterable[Case]:
    # 31 training rows: the last window of an epoch has one row; the longest rows lose their EOS.
    yield _prepare("prepare-alpaca", "instructions.jsonl", "--limit", "39", "--validation-fraction", "0.2",
                   "--max-seq-length", "43", shows='"truncated": [1-9]')  # fmt: skip
    yield _prepare("prepare-all", "instructions.jsonl", "--seed", "3", "--validation-fraction", "0.1",
                   "--template", "material/template.yaml", "--preview", "2")  # fmt: skip
    yield _prepare("prepare-chat", "chat.jsonl", "--validation", "material/conversations.jsonl", "--train-on-prompt")
    yield _prepare("prepare-list", "rows.json", "--max-seq-length", "60", "--overlong", "drop",
                   shows='"dropped": [1-9]')  # fmt: skip
    yield _prepare("prepare-gsm8k", "gsm8k.jsonl", "--gsm8k-annotations", "strip")
    yield _prepare("prepare-text", "text.jsonl", "--max-seq-length", "23")
    yield _prepare("prepare-long", "long.jsonl", shows='"longest_row_tokens": 3..')
    yield _prepare("prepare-completion", "completion.jsonl", "--skip-bad-rows", "2", shows='"refused": 2')


def _training() -> Iterable[Case]:
    for kind, modes in (("plain", PLAIN), ("fused", FUSED)):
        for number, mode in enumerate(modes):
            yield _train(f"{kind}-{mode}", f"training.fused={json.dumps(kind == 'fused')}",
                         f"training.activation_checkpointing={mode}", QV if number % 2 else ALL)  # fmt: skip
    plain, sixteen = "training.fused=false", ("model.dtype=bfloat16", "training.precision=bf16")
    yield _train("memory-limit", ALL, "training.memory_limit=7MiB", shows='"the whole block": [1-9]')
    yield _train("memory-limit-auto", QV, "training.memory_limit=auto", unstable=("memory_limit_bytes",))
    yield _train("packing-plain", ALL, plain, "data.packing=true", "data.packed_tokens=97")
    yield _train("packing-fused", QV, "data.packing=true", "data.packed_tokens=97", "training.micro_batch_size=2")
    yield _train("bf16-plain", QV, plain, *sixteen)
    yield _train("bf16-fused", ALL, *sixteen)
    yield _train("bf16-projections", ALL, *sixteen, "training.activation_checkpointing=projections")
    yield _train("bf16-autocast", ALL, "training.precision=bf16", "training.activation_checkpointing=block")
    yield _train("bf16-upcast", QV, "model.dtype=bfloat16", "model.memory_map=false")
    yield _train("nf4-plain", ALL, plain, "model.dtype=nf4")
    yield _train("nf4-fused", ALL, "model.dtype=nf4", "training.precision=bf16", "model.quantized_cache=nf4-fused/nf4")
    yield _train("nf4-random", QV, "model.dtype=nf4", "model.init=random")
    yield _train("fp16-plain", ALL, plain, *OVERFLOWING, shows='"event": "skipped"')
    yield _train("fp16-fused", ALL, *OVERFLOWING, "model.dtype=float16", shows='"event": "skipped"')
    yield _train("adamw-8bit", ALL, "training.optimizer=adamw_8bit", "lora.r=33")
    yield _train("adamw", QV, "training.betas=[0.8, 0.95]", "training.eps=1e-6", "training.weight_decay=0.2")
    yield _train("sgd", ALL, "training.optimizer=sgd", "training.momentum=0.7", "training.nesterov=true",
                 "training.learning_rate=0.03")  # fmt: skip
    yield _train("cosine", ALL, "training.lr_scheduler=cosine", "training.warmup_ratio=0.3",
                 "training.min_learning_rate=1e-5", "training.log_layer_grad_norms=true")  # fmt: skip
    yield _train("linear", QV, "training.lr_scheduler=linear", "training.warmup_steps=2", "training.max_grad_norm=null",
                 "training.max_steps=null", "training.num_epochs=2", "data.shuffle=false", "training.seed=11",
                 "training.save_every_steps=null")  # fmt: skip
    yield _train("early-stopping", QV, "evaluation.every_steps=2", "evaluation.early_stopping_patience=1",
                 "evaluation.early_stopping_min_delta=9", f"data.validation={OTHER_PREPARED}",
                 needs=("prepare-gsm8k",), shows='"stopped_early": true')  # fmt: skip
    yield _train("init-from", ALL, f"lora.init_from={ADAPTER}", needs=("fused-none",))
    yield _train("random", ALL, "model.init=random", "model.num_layers=3")
    # Fused blocks go by tiles of 2,048 tokens, logits by 4,096 rows, and rows beyond 256 use another attention in bf16.
    long = ("data.train=prepare-long/prepared", "training.micro_batch_size=13",
            "training.gradient_accumulation_steps=1", "training.max_steps=2")  # fmt: skip
    yield _train("long", ALL, *long, needs=("prepare-long",))
    yield _train(
        "long-bf16", ALL, *long, *sixteen, "training.activation_checkpointing=every_2", needs=("prepare-long",)
    )
    # A shape of its own: grouped heads, an intermediate size that is no multiple of 64, a tied head.
    yield _train("odd-full", f"model.path={ODD}", "model.init=random", spec="full")
    yield _train("odd-plain", ALL, plain, f"model.path={ODD_BASE}", "model.dtype=nf4", needs=("odd-full",))
    yield _train("odd-fused", ALL, f"model.path={ODD_BASE}", *sixteen, needs=("odd-full",))
    yield _train("full", "training.learning_rate=1e-4", spec="full")
    yield _train("full-8bit", "training.optimizer=adamw_8bit", "training.precision=bf16",
                 "training.activation_checkpointing=block", spec="full")  # fmt: skip


def _resuming() -> Iterable[Case]:
    kill, stop = Interruption(signal.SIGKILL, 5, -signal.SIGKILL), Interruption(signal.SIGUSR1, 4, 75)
    longer = "training.max_steps=13"
    yield _train("resume-killed", ALL, longer, interruption=kill)
    yield _train("resume-stopped", longer, spec="full", interruption=stop)
    yield _train("resume-overflown", ALL, longer, *OVERFLOWING, "training.optimizer=adamw_8bit", "lora.r=33",
                 "model.dtype=nf4", "data.packing=true", "data.packed_tokens=60", interruption=kill,
                 shows='"event": "skipped"')  # fmt: skip


def _merging() -> Iterable[Case]:
    def merge(name: str, *options: str, base: str = BASE, adapted: str = "fused-none", **more: Any) -> Case:
        paths = ("--model", base, "--adapter", f"{adapted}/run/adapter", "--output", f"{name}/model")
        return Case(name, (("merge-lora", *paths, *options, "--json"),), (adapted, *more.get("needs", ())))

    yield merge("merge-same")
    yield merge("merge-float16", "--dtype", "float16")
    yield merge("merge-meta", "--format", "meta", "--dtype", "bfloat16")
    yield merge("merge-from-meta", "--format", "hf", "--force-base", base="merge-meta/model", adapted="plain-none",
                needs=("merge-meta",))  # fmt: skip
    yield merge("merge-odd", "--format", "meta", base=ODD_BASE, adapted="odd-fused")


def _generating() -> Iterable[Case]:
    def generate(name: str, model: str, needs: str, *options: str) -> Case:
        texts = ("On which river does Marby lie?", "Name a dish.", "hello", "craft:kites and")
        prompts = (*(part for text in texts for part in ("--prompt", text)), "--max-new-tokens", "80")
        return Case(name, (("generate", "--model", model, *prompts, *options, "--json"),), (needs,))

    tuned = (BASE, "fused-none", "--adapter", ADAPTER)
    yield generate("generate-greedy", *tuned, "--temperature", "0", "--compare", "--output", "generate-greedy/a.jsonl")
    yield generate("generate-sampled", *tuned, "--seed", "5", "--temperature", "0.9", "--top-k", "40")
    yield generate("generate-beams", *tuned, "--num-beams", "3")
    yield generate("generate-merged", "merge-same/model", "merge-same", "--dtype", "bfloat16", "--top-p", "0.5")
    yield generate("generate-odd", ODD_BASE, "odd-full", "--temperature", "4", "--top-p", "1")
    yield generate("generate-meta", "merge-meta/model", "merge-meta", "--temperature", "0", "--template", "none")


def _evaluating() -> Iterable[Case]:
    tuned = ("evaluate", "--model", BASE, "--adapter", ADAPTER, "--compare", "--batch-size", "5", "--json")
    rows = ("--data", PREPARED, "--split", "all", "--per-row", "evaluate-rows/rows.jsonl")
    yield Case("evaluate-rows", ((*tuned, *rows),), ("fused-none",))
    questions = ("--task", "gsm8k", "--data", "material/gsm8k.jsonl", "--limit", "7", "--max-new-tokens", "16")
    shots = ("--shots", "2", "--shots-data", "material/shots.jsonl", "--output", "evaluate-gsm8k/shots.jsonl")
    yield Case("evaluate-gsm8k", ((*tuned, *questions), (*tuned, *questions, *shots)), ("fused-none",))


def _planning() -> Iterable[Case]:
    presets = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "tinyllama-1.1b", "llama-3-8b")
    counted = tuple(("count-params", "--preset", name, "--r", "7", "--json") for name in presets)
    here = ("count-params", "--model", BASE, "--target-modules", "all-linear", "--json")
    yield Case("count-params", (*counted, here))
    yield Case("count-adapter", (("count-params", "--model", BASE, "--adapter", ADAPTER, "--json"),), ("fused-none",))
    options = ("--memory", "40GiB", "--micro-batch-size", "3", "--json")
    planned: list[tuple[str, ...]] = []
    planned += [("plan-memory", "--preset", name, "--target-modules", "all-linear", *options) for name in presets]
    changes = (("model.dtype=nf4",), ("data.packing=true", "training.fused=false"), ("training.precision=fp32",),
               ("training.activation_checkpointing=every_3",), ("--device", "cpu"))  # fmt: skip
    planned += [("plan-memory", "--preset", "llama-2-7b", *options, *change) for change in changes]
    planned += [("plan-memory", f"material/{name}.json", "--json") for name in ("lora", "full")]
    yield Case("plan-memory", tuple(planned), ("prepare-alpaca",))
    dry = (("lora", ALL), ("lora", "data.packing=true", "model.dtype=nf4"), ("full", "training.fused=false"))
    commands = tuple(("train", f"material/{spec}.json", *more, "--dry-run", "--json") for spec, *more in dry)
    yield Case("dry-run", commands, ("prepare-alpaca",))


CASES: dict[str, Case] = {
    case.name: case
    for group in (_preparing, _planning, _training, _resuming, _merging, _generating, _evaluating)
    for case in group()
}


def with_needs(names: Iterable[str]) -> list[Case]:
    """The named cases and all that they need, each once and after what it needs."""
    ordered: dict[str, Case] = {}

    def add(name: str) -> None:
        for needed in CASES[name].needs:
            add(needed)
        ordered[name] = CASES[name]

    for name in names:
        add(name)
    return list(ordered.values())

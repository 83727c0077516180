"""Adapters that llamatune trained, opened by PEFT in both generations of transformers, and by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from asking import Answer, Question, adapter_to_gguf, ask, to_gguf
from computing import Computed, compute, without_end, worst_difference
from run_tools import make_spec

from llamatune.checkpoints.converting_adapters import convert_adapter
from llamatune.command_options.conversion import ConvertAdapterOptions
from llamatune.training.train import train

pytestmark = pytest.mark.interop
KINDS: dict[str, dict[str, object]] = {
    "llama-2": {},
    "llama-2, rsLoRA": {"use_rslora": True},
    "llama-2, DoRA": {"kind": "dora"},
    "llama-2, ranks and alphas": {"ranks": {"q_proj": 2, "down_proj": 6}, "alphas": {"v_proj": 3.0}},
    "llama-2, PiSSA": {"init": "pissa"},
    "llama-2 of Meta": {},
    "llama-3": {},
    "smollm": {},
}
"""A base's name and the kind of adapter, and what the spec says of it."""
JUDGES = ["transformers5", "transformers4", "mlx", "llama.cpp", "llama.cpp, its converter"]
"""mlx-lm and llama.cpp are given what `convert-adapter` writes; llama.cpp also what its own converter makes of it."""
UNKNOWN = {
    ("llama.cpp", "DoRA"): "a GGUF adapter is plain LoRA",
    ("llama.cpp, its converter", "DoRA"): "a GGUF adapter is plain LoRA",
    ("llama.cpp, its converter", "rsLoRA"): "the converter reads alpha alone: use convert-adapter",
    ("llama.cpp, its converter", "ranks and alphas"): "the converter reads one alpha alone: use convert-adapter",
}


@dataclass(frozen=True)
class Trained:
    """``base`` is what was trained on, ``of_hf`` the same model as Hugging Face's directory."""

    adapter: Path
    base: Path
    of_hf: Path
    computed: Computed


@pytest.fixture(scope="module")
def trained(bases, outputs, prepared: Callable[..., Path], tiny_rows: Path, tmp_path_factory) -> dict[str, Trained]:
    made = {}
    for name, kind in KINDS.items():
        base = bases[name.partition(",")[0]]
        base = bases.get(f"{name.partition(',')[0]} of transformers 4", base)  # whose theta that release reads, too
        run = tmp_path_factory.mktemp("run") / "run"
        lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", **kind}
        steps = {"training__max_steps": 3, "training__learning_rate": 0.1}
        train(make_spec(base, prepared(tiny_rows, base), run, lora=lora, **steps))
        adapter = run / "adapter"
        of_hf = bases["plain"] if name == "llama-2 of Meta" else base
        computed = compute(base, adapter)
        assert worst_difference_of(computed, compute(base)) > 0.1, "training changed nothing"
        made[name] = Trained(adapter, base, of_hf, computed)
    return made


def worst_difference_of(one: Computed, other: Computed) -> float:
    pairs = zip(one.logits, other.logits, strict=True)
    return max(float((first - second).abs().max()) for first, second in pairs)


@pytest.fixture(scope="module")
def answers(trained: dict[str, Trained], tmp_path_factory) -> Callable[[str], dict[str, Answer]]:
    """A judge's answers, of PEFT also about the adapter alone (``alone: NAME``)."""
    known: dict[str, dict[str, Answer]] = {}
    folder = tmp_path_factory.mktemp("gguf")

    def of(judge: str) -> dict[str, Answer]:
        if judge not in known:
            program = judge.partition(",")[0]
            asked = {name: made for name, made in trained.items() if (judge, name.partition(", ")[2]) not in UNKNOWN}
            if program == "llama.cpp":  # whose converter knows published tokenizers alone
                asked = {name: made for name, made in asked.items() if (made.of_hf / "tokenizer.model").exists()}
            suffix = ".gguf" if program == "llama.cpp" else ""
            models = {name: made.of_hf for name, made in asked.items()}
            adapters = {name: made.adapter for name, made in asked.items()}
            if program in ("llama.cpp", "mlx"):
                adapters = {name: folder / f"{judge}: {name}, adapter{suffix}" for name in asked}
            if program == "llama.cpp":
                files = {base: folder / f"{judge}: {base.name}.gguf" for base in models.values()}
                to_gguf(files)
                models = {name: files[base] for name, base in models.items()}
            if judge == "llama.cpp, its converter":
                adapter_to_gguf({(made.adapter, made.of_hf): adapters[name] for name, made in asked.items()})
            elif program in ("llama.cpp", "mlx"):
                for name, made in asked.items():
                    format_ = "gguf" if suffix else "mlx"
                    convert_adapter(ConvertAdapterOptions(made.adapter, adapters[name], format_, made.base))
            questions = {name: Question(models[name], adapters[name], asked[name].computed.ids) for name in asked}
            if program.startswith("transformers"):
                questions |= {f"alone: {name}": replace(question, model=None) for name, question in questions.items()}
            known[judge] = ask(program, questions)
        return known[judge]

    return of


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("judge", JUDGES)
def test_the_adapter_computes_the_same_on_its_base(judge, name, answers, trained, note):
    if reason := UNKNOWN.get((judge, name.partition(", ")[2])):
        pytest.skip(reason)
    known = answers(judge)
    if name not in known:
        pytest.skip("llama.cpp's converter knows published tokenizers alone")
    worst = worst_difference(known[name], trained[name].computed)
    note(f"{judge} {known[name]['release']}, adapter: {name}", worst)
    assert worst < 1e-4
    computed = trained[name].computed
    assert [without_end(row, computed) for row in known[name]["greedy"]] == computed.greedy


@pytest.mark.parametrize("name", [name for name in KINDS if "Meta" not in name])
@pytest.mark.parametrize("judge", ["transformers5", "transformers4"])
def test_the_adapter_alone_leads_to_its_base(judge, name, answers, trained):
    assert worst_difference(answers(judge)[f"alone: {name}"], trained[name].computed) < 1e-4

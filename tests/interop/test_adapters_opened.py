"""Adapters that llamatune trained, opened by PEFT in both generations of transformers, and by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from asking import Answer, Question, adapter_to_gguf, ask, to_gguf
from computing import Computed, compute, without_end, worst_difference
from run_tools import make_spec

from llamatune.training.train import train

pytestmark = pytest.mark.interop
KINDS: dict[str, dict[str, object]] = {
    "llama-2": {},
    "llama-3": {},
    "smollm": {},
    "llama-2 of Meta": {},
}
"""A base's name and the kind of adapter, and what the spec says of it."""
MERGED_FIRST = {"rsLoRA", "DoRA", "ranks", "alphas"}
"""What llama.cpp's converter does not know."""


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
            questions = {}
            for name, made in trained.items():
                if judge != "llama.cpp":
                    questions[name] = Question(made.of_hf, made.adapter, made.computed.ids)
                    questions[f"alone: {name}"] = Question(None, made.adapter, made.computed.ids)
                elif (made.base / "tokenizer.model").exists():
                    model = to_gguf(made.of_hf, folder / f"{name}.gguf")
                    adapter = adapter_to_gguf(made.adapter, made.of_hf, folder / f"{name}-adapter.gguf")
                    questions[name] = Question(model, adapter, made.computed.ids)
            known[judge] = ask(judge, questions)
        return known[judge]

    return of


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("judge", ["transformers5", "transformers4", "llama.cpp"])
def test_the_adapter_computes_the_same_on_its_base(judge, name, answers, trained, note):
    known = answers(judge)
    if name not in known:
        pytest.skip(f"{judge}'s converter knows published tokenizers alone")
    kind = name.partition(", ")[2]
    if judge == "llama.cpp" and kind in MERGED_FIRST:
        pytest.skip(f"llama.cpp's converter knows no {kind}")
    worst = worst_difference(known[name], trained[name].computed)
    note(f"{judge} {known[name]['release']}, adapter: {name}", worst)
    assert worst < 1e-4
    computed = trained[name].computed
    assert [without_end(row, computed) for row in known[name]["greedy"]] == computed.greedy


@pytest.mark.parametrize("name", [name for name in KINDS if "Meta" not in name])
@pytest.mark.parametrize("judge", ["transformers5", "transformers4"])
def test_the_adapter_alone_leads_to_its_base(judge, name, answers, trained):
    assert worst_difference(answers(judge)[f"alone: {name}"], trained[name].computed) < 1e-4

"""``judge --choices`` against lm-evaluation-harness: the same log-likelihood of each choice, the same rows right."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import SCRIPTS, need, run
from environments import CACHE

from llamatune.command_options.inference import ModelSource
from llamatune.data.choice_rows import read_choices
from llamatune.inference.choice_scores import choice_batches, encode_choices, score_choices
from llamatune.inference.model_source import open_model

pytestmark = pytest.mark.interop
JUDGE, SMOLLM2 = "lm-eval", CACHE / "smollm2-135m-instruct"
TEXTS = """
a red llama walks over green hills|counts nine blue apples|cold rain falls|seven old stones, café ñ|The capital is Paris
|1024|x + y = z|she says "no" and goes|in 1865 the war ended|🦙 runs|def f(n): return n|a|one two  three
""".replace("\n", "").split("|")


def make_rows(shape: str, count: int, chance: random.Random) -> list[dict[str, object]]:
    """Rows of a shape with what its rules are about: marks of WikiHow, spaces, several numbers of choices, subjects."""
    rows = list[dict[str, object]]()
    for n in range(count):
        asked, first, second = chance.sample(TEXTS, 3)
        choices = chance.sample(TEXTS, 4 if shape != "arc" else 3 + n % 3)
        right = chance.randrange(len(choices))
        if shape == "mmlu":
            subject = ("abstract_algebra", "high_school_mathematics")[n % 2]
            rows.append({"question": f" {asked} {first}? ", "choices": choices, "answer": right, "subject": subject})
        elif shape == "arc":
            labels = list("ABCDE") if n % 2 else list("12345")
            found = {"text": choices, "label": labels[: len(choices)]}
            rows.append({"question": f"{asked} {first}", "choices": found, "answerKey": labels[right]})
        else:
            endings = [f"{text} [title] More  of it" if n % 3 == 0 else text for text in choices]
            endings[right - 1] = "[step]" if n % 7 == 3 else endings[right - 1]
            ctx_b = "then The man" if n % 2 else ""
            row = {"activity_label": "Baking [x] bread", "ctx_a": f"{asked}. [header] {first} [title] {second}"}
            rows.append({**row, "ctx_b": ctx_b, "endings": endings, "label": right})
    return rows


@pytest.mark.parametrize("name", ["stories260K", "stories260K with an adapter", "smollm2"])
def test_the_harness_finds_the_same(
    name: str, shared_fixtures: Path, peft_adapter: Callable[..., Path], tmp_path: Path,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    need(JUDGE)
    model = SMOLLM2 if name == "smollm2" else shared_fixtures / "stories260K-hf"
    if not model.is_dir():
        pytest.skip(f"no {model.name} in {CACHE}: run `make test-interop` where it can be fetched")
    adapter = peft_adapter(model) if "adapter" in name else None
    files, chance = {}, random.Random(7)
    for shape in ("mmlu", "hellaswag", "arc"):
        files[shape] = tmp_path / f"{shape}.jsonl"
        rows = make_rows(shape, 12 if name == "smollm2" else 60, chance)
        files[shape].write_text("".join(json.dumps(row) + "\n" for row in rows))
    question, answer = tmp_path / "question.json", tmp_path / "answer.json"
    question.write_text(json.dumps({"model": model, "adapter": adapter, "files": files}, default=str))
    run(JUDGE, SCRIPTS / "harness_judge.py", question, answer)
    expected = json.loads(answer.read_text())
    opened = open_model(ModelSource(model, adapter=adapter, dtype="float32", device="cpu"))
    tokenizer, most = opened.tokenizer(), opened.config.max_position_embeddings
    computed = opened.load(lambda event: None, lambda: False).by_prefix[""]
    worst = 0.0
    for shape, path in files.items():
        encoded = [encode_choices(asked, tokenizer, most, path) for asked in read_choices(path).questions]
        scores = [score for batch in choice_batches(encoded, 16) for score in score_choices(computed, batch)]
        for score, line in zip(scores, expected[shape], strict=True):
            assert score.loglikelihoods == pytest.approx(line["loglikelihoods"], rel=1e-5, abs=1e-4)
            assert (float(score.acc), float(score.acc_norm)) == (line["acc"], line.get("acc_norm", line["acc"]))
            pairs = zip(score.loglikelihoods, line["loglikelihoods"], strict=True)
            worst = max(worst, *(abs(own - other) / abs(other) for own, other in pairs))
    tell(f"{name}: largest difference of a log-likelihood {worst:.1e} of it")

"""Prompts that a run answers at its evaluations: the answers, and that training does not notice them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import StopAfter, adapter_tensors, assert_same_outcome, last_checkpoint, make_spec, metrics

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.errors import DataError, SpecError, Stopped
from llamatune.events import AnswersDone, Event
from llamatune.inference.generate import generate
from llamatune.inference.prepared_prompts import PreparedRows
from llamatune.training.train import train

ASKED: dict[str, Any] = {"evaluation__prompts": 3, "evaluation__max_new_tokens": 9}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "bf16": {"model__dtype": "bfloat16", "training__precision": "bf16"},
    "autocast": {"training__precision": "bf16"},
    "fp16": {"model__dtype": "float16", "training__precision": "fp16"},
    "dora": {"lora": {"kind": "dora", "r": 3, "dropout": 0.1}},
    "nf4": {"model__dtype": "nf4", "training__precision": "bf16"},
    "plain": {"training__fused": False},
    "checkpointed": {"training__activation_checkpointing": "block"},
    "whole modules": {"lora": {"r": 3, "dropout": 0.1, "modules_to_save": ["lm_head"]}},
    "host": {"model__placement": "host"},
    "full": {"lora": None},
    "full, checkpointed": {"lora": None, "training__activation_checkpointing": "block", "training__precision": "bf16"},
}


@pytest.fixture
def data(prepared: Callable[..., Path]) -> Path:
    return prepared(validation_fraction=0.3)


def answers(run: Path) -> list[tuple[int, int, str]]:
    return [(line["step"], line["number"], line["answer"]) for line in metrics(run, "answer")]


def without_answers(run: Path) -> None:
    """Take the answers out of a log, whose length a checkpoint holds."""
    log = run / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"answer"' not in line))


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice_the_prompts(
    tiny_base: Callable[..., Path], data: Path, tmp_path: Path, kind: str
) -> None:
    """Same bytes and losses as without, whatever is trained and however it is held."""
    for name, asked in (("with", ASKED), ("without", {})):
        changes = {**KINDS[kind], **asked, "evaluation__every_steps": 2, "training__max_steps": 4}
        train(make_spec(tiny_base(), data, tmp_path / name, **changes))
    found = answers(tmp_path / "with")
    assert [(step, number) for step, number, _ in found] == [(s, n) for s in (0, 2, 4) for n in (1, 2, 3)]
    without_answers(tmp_path / "with")
    assert_same_outcome(tmp_path / "with", tmp_path / "without", cards=False)


@pytest.mark.parametrize("kind", ["lora", "dora", "whole modules"])
def test_the_answers_are_those_of_generate(
    tiny_base: Callable[..., Path], data: Path, tmp_path: Path, kind: str
) -> None:
    """After the last step of the adapter that is written, and before the first of the base alone."""
    run, told = tmp_path / "run", list[Event]()
    changes = {**KINDS[kind], **ASKED, "training__learning_rate": 0.2}
    train(make_spec(tiny_base(), data, run, **changes), on_event=told.append)
    rows, sampling = PreparedRows(data, {"validation": 3}), Sampling(9, temperature=0)
    tuned = generate(ModelSource(tiny_base(), adapter=run / "adapter", dtype="float32"), rows, sampling)
    base = generate(ModelSource(tiny_base(), dtype="float32"), rows, sampling)
    lines = metrics(run, "answer")
    assert [line["answer"] for line in lines[:3]] == [made.completion for made in base.results]
    assert [line["answer"] for line in lines[-3:]] == [made.completion for made in tuned.results]
    assert [line["finish_reason"] for line in lines[-3:]] == [made.finish_reason for made in tuned.results]
    assert [line["prompt"] for line in lines[:3]] == [made.prompt for made in base.results]
    assert [line["reference"] for line in lines[:3]] == [line["reference"] for line in base.lines]
    assert {line["answer"] for line in lines[:3]} != {line["answer"] for line in lines[-3:]}
    done = [event for event in told if isinstance(event, AnswersDone)]
    assert [(a.step, a.number, a.answer) for event in done for a in event.answers] == answers(run)


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_answers_as_one_that_nothing_stopped(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, stop: int, validation: bool
) -> None:
    """Each prompt once at each evaluation; without validation data, at the end of each epoch."""
    data = prepared(validation_fraction=0.3) if validation else prepared()
    changes = {**ASKED, "training__num_epochs": 2, "training__save_every_steps": 2}
    train(make_spec(tiny_base(), data, tmp_path / "whole", **changes))
    spec, asked = make_spec(tiny_base(), data, tmp_path / "parts", **changes), StopAfter(stop)
    if not validation:
        asked._begun = True
    with pytest.raises(Stopped):
        train(spec, on_event=asked.on_event, should_stop=asked.should_stop)
    train(spec)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    assert answers(tmp_path / "parts") == answers(tmp_path / "whole")
    steps = sorted({step for step, _, _ in answers(tmp_path / "whole")})
    assert len(answers(tmp_path / "whole")) == 3 * len(steps)
    assert len(steps) == 3


def test_a_stop_while_answering_leaves_the_evaluation_to_the_next_start(
    tiny_base: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    spec = make_spec(tiny_base(), data, tmp_path / "parts", **ASKED)
    train(make_spec(tiny_base(), data, tmp_path / "whole", **ASKED))
    for count in (1, 4, 13):
        seen: list[Event] = []
        tokens = lambda seen=seen: sum(getattr(event, "task", "") == "answering" for event in seen)  # noqa: E731
        with pytest.raises(Stopped):
            train(spec, on_event=seen.append, should_stop=lambda: tokens() >= count)  # noqa: B023
    train(spec)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    assert answers(tmp_path / "parts") == answers(tmp_path / "whole")


def test_prompts_of_a_file_in_the_template_of_the_rows(
    tiny_base: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "counts nine apples"}, {"prompt": "a red llama", "completion": "walks over hills"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"evaluation__prompts": str(prompts), "evaluation__max_new_tokens": 5, "training__max_steps": 1}
    train(make_spec(tiny_base(), data, tmp_path / "run", **changes))
    first, second = metrics(tmp_path / "run", "answer")[:2]
    assert [line["prompt"] for line in (first, second)] == ["counts nine apples", "a red llama"]
    assert (first["reference"], second["reference"]) == (None, "walks over hills")
    others = tmp_path / "others.txt"  # which change nothing that is computed
    others.write_text("other prompts\n")
    changes |= {"training__max_steps": 2, "evaluation__prompts": str(others), "evaluation__max_new_tokens": 4}
    train(make_spec(tiny_base(), data, tmp_path / "run", **changes))
    assert metrics(tmp_path / "run", "answer")[-1]["prompt"] == "other prompts"


def test_prompts_that_cannot_be_used_end_the_run_before_it_begins(
    tiny_base: Callable[..., Path], data: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": 1}\n')
    for wanted, fault, told in (
        (str(tmp_path / "absent"), DataError, "absent"),
        (str(broken), DataError, "broken.jsonl:1"),
        (0, SpecError, "evaluation.prompts"),
        (65, SpecError, "evaluation.prompts"),
    ):
        with pytest.raises(fault, match=told):
            train(make_spec(tiny_base(), data, tmp_path / "run", evaluation__prompts=wanted))
        assert not (tmp_path / "run").exists()


def test_the_generators_of_the_process_are_left_alone(
    tiny_base: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """Beside the bytes, which a seed for each pass would keep anyway."""
    states: list[torch.Tensor] = []

    def note(event: Event) -> None:
        if isinstance(event, AnswersDone) or getattr(event, "event", "") == "eval":
            states.append(torch.get_rng_state())

    train(make_spec(tiny_base(), data, tmp_path / "run", **ASKED), on_event=note)
    assert len(states) == 4
    assert torch.equal(states[2], states[3])
    assert adapter_tensors(last_checkpoint(tmp_path / "run"))

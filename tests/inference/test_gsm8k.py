"""GSM8K: the official rule, few-shot prompts, and an evaluation that is killed anywhere and goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.command_options.inference import EvaluateOptions
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.data.templates import TEMPLATES
from llamatune.errors import DataError, EnvironmentFault, LlamatuneError, SpecError, Stopped
from llamatune.inference import engine, gsm8k, model_completions
from llamatune.inference.gsm8k import (
    Question,
    choose_examples,
    evaluate_gsm8k,
    few_shot_prompt,
    gsm8k_report,
    read_questions,
    scored_line,
)
from llamatune.inference.gsm8k_answers import extract_answer, is_answered
from llamatune.inference.prompt_files import prompt_text
from llamatune.spec import build_spec
from llamatune.training.train import train

INVALID = "[invalid]"
TEXTS = st.text(alphabet="#### --0123456789.,\n $aQuestion:", max_size=40) | st.text(max_size=20)


def official(completion: str) -> str:
    """The published rule: search the pattern, strip, drop commas; ``[invalid]`` where there is no match."""
    match = re.compile(r"#### (\-?[0-9\.\,]+)").search(completion)
    return match.group(1).strip().replace(",", "") if match else INVALID


def scanned(text: str) -> str:
    """The same rule without a pattern: the first mark that a number follows."""
    for start in range(len(text)):
        if not text.startswith("#### ", start):
            continue
        rest = text[start + 5 :]
        sign = "-" if rest.startswith("-") else ""
        number = ""
        for character in rest[len(sign) :]:
            if character not in "0123456789.,":
                break
            number += character
        if number:
            return sign + number.replace(",", "")
    return INVALID


@given(TEXTS)
def test_an_answer_is_extracted_by_the_official_rule(text: str) -> None:
    assert (
        (extract_answer(text) or (INVALID if extract_answer(text) is None else "")) == official(text) == scanned(text)
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### 3.50", "3.50"),
        ("#### 18 dollars a day", "18"),
        ("#### 18.", "18."),
        ("#### 7\n#### 8", "7"),
        ("#### none\n#### 8", "8"),
        ("####18", None),
        ("#### $18", None),
        ("#### \u221218", None),
        ("the answer is 18", None),
        ("", None),
    ],
)
def test_what_counts_as_an_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_every_reference_answer_is_right_and_nothing_else_is(shared_fixtures: Path) -> None:
    path = shared_fixtures / "data" / "gsm8k_test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = read_questions(path)
    assert [(question.text, question.worked) for question in questions] == [(r["question"], r["answer"]) for r in rows]
    assert [question.expected for question in questions] == [official(row["answer"]) for row in rows]
    assert {official(row["answer"]) for row in rows}.isdisjoint({INVALID})

    def score(completions: list[str]) -> dict[str, Any]:
        scored = [scored_line(q, {"": (text, "eos")}) for q, text in zip(questions, completions, strict=True)]
        return gsm8k_report("rows", "float32", 0, scored)

    assert score([row["answer"] for row in rows]).items() >= {"correct": 1319, "accuracy": 1.0, "invalid": 0}.items()
    shifted = [row["answer"] for row in rows[1:] + rows[:1]]
    expected = sum(official(said) == official(row["answer"]) for said, row in zip(shifted, rows, strict=True))
    assert score(shifted)["correct"] == expected < 100
    unmarked = [row["answer"].replace("####", "Answer:") for row in rows]
    assert score(unmarked).items() >= {"correct": 0, "accuracy": 0.0, "invalid": 1319}.items()


@given(TEXTS, TEXTS)
@settings(max_examples=300)
def test_what_comes_after_an_answer_cannot_change_it(text: str, more: str) -> None:
    if is_answered(text, few_shot=False):
        assert extract_answer(text + more) == extract_answer(text) is not None


def test_an_answer_may_grow_until_its_number_has_ended() -> None:
    assert not is_answered("#### 18", few_shot=False)
    assert is_answered("#### 18\n", few_shot=False)
    assert not is_answered("none\n\nQuestion:", few_shot=False)
    assert is_answered("none\n\nQuestion:", few_shot=True)


# Rows and prompts.


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


GOOD = {"question": "How many?", "answer": "Two.\n#### 2"}


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ({"question": "How many?"}, "no field 'answer'"),
        ({"question": "How many?", "answer": ""}, "field 'answer' of the row is empty"),
        ({"question": "How many?", "answer": "Two."}, "no '#### number'"),
        ({"answer": "#### 2"}, "no field 'question'"),
        ({"instruction": "How many?", "output": "#### 2"}, "the row has 'instruction', 'output'"),
        ({"quesstion": "How many?", "answer": "#### 2"}, "did you mean 'question'?"),
        ({"question": ["How many?", "Two?"], "answer": "#### 2"}, "is a list, not a string"),
        ({"question": "How many?", "answer": "#### 2", "context": "Two."}, "would be lost"),
    ],
)
def test_a_row_without_an_answer_is_an_error_with_its_line(tmp_path: Path, bad: dict[str, Any], part: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD, bad])
    with pytest.raises(DataError) as fault:
        read_questions(path)
    assert f"{path}:3" in str(fault.value)
    assert part in str(fault.value)
    assert "--map" not in str(fault.value)  # which evaluate does not have


def test_what_a_file_of_questions_holds_beside_them_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"data": [GOOD], "version": 1}))
    events = list[Any]()
    assert len(read_questions(tmp_path / "rows.json", events.append)) == 1
    assert [event.message.split(": ", 1)[1] for event in events] == [
        "the rows are those of 'data'; left out beside it: 'version'"
    ]


def test_examples_are_a_function_of_the_seed_and_never_a_question_that_is_asked(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    asked = [Question(1, f"What is {n}?", "", "") for n in range(5, 25)]
    chosen = [[row.row for row in choose_examples(path, 4, seed, asked)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    everything = choose_examples(path, 10, 3, asked)
    assert {row.text for row in everything} == {f"What is {n}?" for n in (*range(5), *range(25, 30))}
    assert [row.row for row in everything][:4] == [row.row for row in choose_examples(path, 4, 3, asked)]
    with pytest.raises(DataError, match="10 rows that are not asked themselves, fewer than 11 shots"):
        choose_examples(path, 11, 0, asked)


def test_prompts_are_written_out() -> None:
    asked, shown = Question(1, "One?", "", "1"), Question(2, "Two?", "1 + 1 = <<1+1=2>>2\n#### 2", "2")
    assert prompt_text(asked.text, TEMPLATES["gsm8k"], 1) == "Question: One?\nAnswer:"
    assert prompt_text(asked.text, None, 1) == "One?"
    assert prompt_text(asked.text, TEMPLATES["alpaca"], 1).endswith("### Instruction:\nOne?\n\n### Response:")
    expected = "Question: Two?\nAnswer: 1 + 1 = <<1+1=2>>2\n#### 2\n\n" * 2 + "Question: One?\nAnswer:"
    assert few_shot_prompt(asked, [shown, shown]) == expected


# A tiny model that learns eight problems by heart.

WORDS = "red llamas walk over green hills and count blue apples while cold rain falls on old stones".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]) -> Path:
    """``base``, ``rows.jsonl``, and ``adapter``, which answers the first eight of the ten rows right."""
    place = tmp_path_factory.mktemp("school")
    chance = random.Random(2)
    rows = []
    for number in range(10):
        said = " ".join(chance.sample(WORDS, 3))
        more = "\nblue hills" if number % 2 else ""
        rows.append({"question": f"{number} {said}?", "answer": f"{said}\n#### {chance.randrange(1000, 9999):,}{more}"})
    write_rows(place / "rows.jsonl", rows)
    write_rows(place / "learned.jsonl", rows[:8])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for row in rows * 9 for text in row.values()]), model_type="bpe", vocab_size=420,
        model_prefix=str(place / "tokenizer"), byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    shutil.copytree(tiny_base(vocab_size=420), place / "base")
    shutil.copy(place / "tokenizer.model", place / "base")
    prepare_data(PrepareOptions([place / "learned.jsonl"], place / "base", place / "data"))
    train(build_spec({
        "model": {"path": str(place / "base"), "dtype": "float32"},
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {"train": str(place / "data")},
        "training": {"output_dir": str(place / "run"), "max_steps": 120, "micro_batch_size": 8,
                     "gradient_accumulation_steps": 1, "learning_rate": 0.01, "precision": "fp32", "device": "cpu",
                     "save_every_steps": 1000},
    }, "test"))  # fmt: skip
    (place / "run" / "adapter").rename(place / "adapter")
    return place


def evaluation(school: Path, **changes: Any) -> EvaluateOptions:
    """Batches of 3 of the ten questions, base and tuned."""
    given = {"adapter": school / "adapter", "compare": True, "batch_size": 3, "max_new_tokens": 24, **changes}
    return EvaluateOptions(task="gsm8k", device="cpu", model=school / "base", data=school / "rows.jsonl", **given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_what_was_learned_by_heart_is_right_and_the_rest_is_not(school: Path, tmp_path: Path) -> None:
    """Greedy answers of PEFT's model under transformers, with the official rule, are the judge of every line."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    found = evaluate_gsm8k(evaluation(school, output=tmp_path / "out.jsonl"))
    assert found["correct"] >= 7
    assert found["base_correct"] == 0
    assert found["accuracy_difference"] == found["accuracy"] == found["correct"] / 10
    assert (found["gained"], found["lost"]) == (found["correct"], 0)
    assert found["p_value"] == pytest.approx(2 / 2 ** found["gained"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(school / "tokenizer.model"))
    base = LlamaForCausalLM.from_pretrained(school / "base")
    rows, written = lines(school / "rows.jsonl"), lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in written] == list(range(1, 11))
    assert [line["finish_reason"] for line in written if line["correct"]][:4] == ["eos", "stop", "eos", "stop"]

    def judge(prefix: str, model: torch.nn.Module) -> None:
        for row, line in zip(rows, written, strict=True):
            prompt = [1, *tokenizer.encode(f"Question: {row['question']}\nAnswer:")]
            ids = model.generate(
                input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=2, pad_token_id=2
            )[0, len(prompt) :].tolist()
            text = tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids)
            completion = line[f"{prefix}completion"].lstrip(" ")
            assert text.lstrip(" ").startswith(completion)
            assert line[f"{prefix}finish_reason"] == "stop" or text.lstrip(" ") == completion
            answer = official(text)
            assert line[f"{prefix}answer"] == (None if answer == INVALID else answer)
            assert line[f"{prefix}correct"] == (answer == official(row["answer"]))

    judge("base_", base)
    judge("", PeftModel.from_pretrained(base, school / "adapter"))


def test_the_batch_size_changes_no_answer(school: Path, tmp_path: Path) -> None:
    outputs = []
    for size in (1, 3, 8):
        outputs.append(tmp_path / f"{size}.jsonl")
        evaluate_gsm8k(evaluation(school, output=outputs[-1], batch_size=size))
    assert len({path.read_bytes() for path in outputs}) == 1


def test_few_shot_prompts_are_what_the_model_is_given_and_end_where_the_next_question_begins(
    school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = write_rows(tmp_path / "shots.jsonl", [*lines(school / "rows.jsonl"), GOOD, {**GOOD, "question": "So?"}])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(school / "tokenizer.model"))
    completions, prompts, ends = model_completions.completions, [], []

    def watched(model: Any, batch: list[list[int]], *given: Any) -> Any:
        prompts.extend(tokenizer.decode(ids[1:]) for ids in batch)
        ends.append(given[4]([], tokenizer.encode("no\n\nQuestion:")))
        return completions(model, batch, *given)

    monkeypatch.setattr(model_completions, "completions", watched)
    few = evaluation(school, shots=2, shots_data=shots, seed=1, output=tmp_path / "few.jsonl", limit=3, compare=False)
    assert evaluate_gsm8k(few)["shots"] == 2
    examples = json.loads((tmp_path / "few.jsonl.settings.json").read_text())["shots"]
    assert {example["text"] for example in examples} == {"How many?", "So?"}
    shown = "".join(f"Question: {example['text']}\nAnswer: Two.\n#### 2\n\n" for example in examples)
    asked = [f"Question: {row['question']}\nAnswer:" for row in lines(school / "rows.jsonl")[:3]]
    assert prompts == [shown + question for question in asked]
    evaluate_gsm8k(evaluation(school, limit=3, compare=False))
    assert prompts[3:] == asked
    assert ends == [True, False]


# Killed, stopped, continued.


@pytest.fixture(scope="module")
def finished(school: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    output = tmp_path_factory.mktemp("finished") / "out.jsonl"
    evaluate_gsm8k(evaluation(school, output=output))
    return output.read_bytes(), output.with_name("out.jsonl.settings.json").read_bytes()


def cuts(content: bytes) -> Iterator[bytes]:
    """States that a kill, a full disk or a power cut may leave behind."""
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for count in (0, 1, 2, 3, 5, 6, 9):
        whole = content[: ends[count] + 1]
        yield whole
        yield whole[:-1]
        yield whole + content[len(whole) :][:25]
    yield content[: ends[3] + 1] + b"\0" * 300
    yield content[: ends[4] + 1] + b"{}\n" + content[ends[4] + 1 :]
    yield content.replace(b'"row": 7', b'"row": 9')
    yield content + b'{"row": 11}\n'


def test_whatever_is_left_of_an_output_it_ends_in_the_same_bytes(
    school: Path, tmp_path: Path, finished: tuple[bytes, bytes]
) -> None:
    output = tmp_path / "out.jsonl"
    content, beside = finished
    for left in cuts(content):
        output.write_bytes(left)
        output.with_name("out.jsonl.settings.json").write_bytes(beside)
        evaluate_gsm8k(evaluation(school, output=output))
        assert output.read_bytes()[: len(content)] == content, left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


KILLED = """
import os, signal, sys
from llamatune.cli import main
count, sync = int(sys.argv[1]), os.fsync
def fsync(descriptor):
    global count
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("out.jsonl"):
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = fsync
main(sys.argv[2:])
"""


def arguments(school: Path, output: Path | None) -> list[str]:
    words = ["evaluate", "--model", school / "base", "--adapter", school / "adapter", "--compare", "--task", "gsm8k",
             "--data", school / "rows.jsonl", "--batch-size", 3, "--max-new-tokens", 24, "--device", "cpu"]  # fmt: skip
    return [str(word) for word in [*words, *(("--output", output) if output else ())]]


def test_killed_between_two_batches_the_same_command_goes_on(
    school: Path, tmp_path: Path, finished: tuple[bytes, bytes], command: Callable[..., Any]
) -> None:
    words = arguments(school, tmp_path / "out.jsonl")
    done = subprocess.run([sys.executable, "-c", KILLED, "2", *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert 6 <= len(lines(tmp_path / "out.jsonl")) <= 9
    assert command(*words).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == finished[0]


@pytest.mark.parametrize("kept", [True, False])
def test_a_signal_stops_it_between_two_tokens_and_keeps_what_is_answered(
    school: Path, tmp_path: Path, finished: tuple[bytes, bytes], command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, kept: bool,
) -> None:  # fmt: skip
    output = tmp_path / "out.jsonl"
    step, calls = engine.Engine.step, itertools.count()

    def interrupted(self: engine.Engine) -> Any:
        if next(calls) == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(engine.Engine, "step", interrupted)
    outcome = command(*arguments(school, output if kept else None))
    assert (outcome.code, outcome.stdout) == (75 if kept else 130, "")
    told = re.match("error: stopped after ([0-9]+) of 10 questions", outcome.stderr.splitlines()[-1])
    assert told is not None
    assert 0 < int(told[1]) < 10
    assert next(calls) == 61, "no further token"
    monkeypatch.undo()
    if kept:
        assert len(lines(output)) == int(told[1])
        assert command(*arguments(school, output)).code == 0
        assert output.read_bytes() == finished[0]


def test_a_finished_output_is_scored_without_loading_the_model(
    school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    first = evaluate_gsm8k(evaluation(school, output=output, limit=4))
    assert len(lines(output)) == 4
    whole = evaluate_gsm8k(evaluation(school, output=output))
    before = output.read_bytes()
    monkeypatch.setattr(gsm8k, "_answer", None)
    assert evaluate_gsm8k(evaluation(school, output=output)) == whole
    assert evaluate_gsm8k(evaluation(school, output=output, limit=4)) == first
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": 25}, "max_new_tokens"),
        ({"adapter": None, "compare": False}, "adapter, compare"),
        ({"compare": False}, "compare"),
        ({"template": "alpaca"}, "template"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_an_output_of_other_settings_is_left_alone(
    school: Path, tmp_path: Path, finished: tuple[bytes, bytes], changes: dict[str, Any], named: str
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(finished[0])
    output.with_name("out.jsonl.settings.json").write_bytes(finished[1])
    with pytest.raises(EnvironmentFault, match=f"another {named}: "):
        evaluate_gsm8k(evaluation(school, output=output, **changes))
    assert output.read_bytes() == finished[0]
    evaluate_gsm8k(evaluation(school, output=output, overwrite=True, limit=1, **changes))
    assert len(lines(output)) == 1
    evaluate_gsm8k(evaluation(school, output=output, limit=2, **changes))
    assert len(lines(output)) == 2


def test_a_file_of_somebody_else_and_one_in_use_are_left_alone(school: Path, tmp_path: Path) -> None:
    import fcntl

    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    with pytest.raises(EnvironmentFault, match="says what wrote it"):
        evaluate_gsm8k(evaluation(school, output=other))
    assert other.read_text() == "mine\n"
    with (tmp_path / "used.jsonl").open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="in use by another process"):
            evaluate_gsm8k(evaluation(school, output=tmp_path / "used.jsonl", overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "used.jsonl"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shots": 1}, SpecError),
        ({"shots": -1}, SpecError),
        ({"shots_data": Path("rows")}, SpecError),
        ({"shots": 1, "shots_data": Path("rows"), "template": "gsm8k"}, SpecError),
        ({"max_new_tokens": 0}, SpecError),
        ({"template": "absent"}, SpecError),
        ({"shots": 1, "shots_data": Path("absent")}, DataError),
    ],
)
def test_options_that_do_not_fit(school: Path, changes: dict[str, Any], fault: type[LlamatuneError]) -> None:
    with pytest.raises(fault):
        evaluate_gsm8k(evaluation(school, **changes))


def test_it_asks_whether_to_stop(school: Path) -> None:
    with pytest.raises(Stopped, match="stopped after 0 of 10 questions"):
        evaluate_gsm8k(evaluation(school), should_stop=lambda: True)

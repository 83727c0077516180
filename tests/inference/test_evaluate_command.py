"""``llamatune evaluate`` as scripts and people use it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
ROWS = {"data", "split", "rows", "tokens", "target_tokens", "dtype", "loss", "perplexity", "token_accuracy"}
ROWS_COMPARED = ROWS | {
    "base_loss", "base_perplexity", "base_token_accuracy", "loss_difference", "loss_difference_interval",
    "improved_rows",
}  # fmt: skip
SCORES = {"correct", "accuracy", "accuracy_interval", "invalid", "unfinished"}
GSM8K = {"task", "data", "shots", "questions", "dtype"} | SCORES
GSM8K_COMPARED = GSM8K | {f"base_{name}" for name in SCORES} | {"accuracy_difference", "gained", "lost", "p_value"}


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base: Path, peft_adapter: Callable[..., Path]) -> Path:
    return peft_adapter(base)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    rows = [{"question": f"nine {word}", "answer": f"red\n#### {n}"} for n, word in enumerate(("hills", "apples"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_is_one_object_of_the_documented_keys(
    command: Command, base: Path, adapter: Path, prepared: Callable[..., Path], questions: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    of_rows, of_gsm8k = ("--data", prepared()), ("--task", "gsm8k", "--data", questions, "--max-new-tokens", 5)
    compared = ("--adapter", adapter, "--compare")
    for words, keys in (
        (of_rows, ROWS), ((*of_rows, *compared), ROWS_COMPARED), (of_gsm8k, GSM8K),
        ((*of_gsm8k, *compared), GSM8K_COMPARED),
    ):  # fmt: skip
        outcome = command("evaluate", "--model", base, *words, "--json")
        assert outcome.code == 0, outcome.stderr
        assert outcome.stdout.count("\n") == 1
        assert json.loads(outcome.stdout).keys() == keys
        assert [key for key in keys if f"`{key}`" not in page] == []


def test_without_a_terminal_each_number_is_a_line(
    command: Command, base: Path, prepared: Callable[..., Path], questions: Path
) -> None:
    for words in (("--data", prepared()), ("--data", questions, "--task", "gsm8k", "--max-new-tokens", 5)):
        told = json.loads(command("evaluate", "--model", base, *words, "--json").stdout)
        lines = [line.partition("=") for line in command("evaluate", "--model", base, *words).stdout.splitlines()]
        assert [key for key, _, _ in lines] == list(told)
        for key, _, text in lines:
            if isinstance(told[key], float):
                assert float(text) == pytest.approx(told[key], rel=1e-5)
            elif not isinstance(told[key], list):
                assert text == str(told[key])


@pytest.mark.parametrize("compare", [False, True])
def test_on_a_terminal_there_is_a_table(
    command: Command, base: Path, adapter: Path, prepared: Callable[..., Path], questions: Path,
    monkeypatch: pytest.MonkeyPatch, compare: bool,
) -> None:  # fmt: skip
    from llamatune.commands import _progress_bars as _progress_display

    opened = _progress_display.open_console

    def terminal(file: Any) -> Any:
        console = opened(file)
        console._force_terminal, console._color_system = True, None
        return console

    monkeypatch.setattr(_progress_display, "open_console", terminal)
    more = ("--adapter", adapter, "--compare") if compare else ()
    shown = command("evaluate", "--model", base, "--data", prepared(), *more)
    told = json.loads(command("evaluate", "--model", base, "--data", prepared(), *more, "--json").stdout)
    assert shown.code == 0, shown.stderr
    for name in ("perplexity", "base_perplexity"):
        assert (f"{told.get(name, 0):.4f}" in shown.stdout) == (name in told)
    assert ("Tuning changed the loss by" in shown.stdout) == compare
    words = ("--data", questions, "--task", "gsm8k", "--max-new-tokens", 5)
    shown = command("evaluate", "--model", base, *words, *more)
    assert "0.0% to 65.8%" in shown.stdout
    assert ("McNemar's exact test" in shown.stdout) == compare


def test_per_row_holds_a_line_for_each_row(
    command: Command, base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = command("evaluate", "--model", base, "--data", prepared(), "--per-row", tmp_path / "rows.jsonl", "--json")
    told = json.loads(outcome.stdout)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == told["rows"]
    assert all(row.keys() == {"split", "row", "tokens", "target_tokens", "loss", "correct_tokens"} for row in rows)
    assert sum(row["loss"] * row["target_tokens"] for row in rows) / told["target_tokens"] == pytest.approx(
        told["loss"]
    )
    assert sum(row["correct_tokens"] for row in rows) / told["target_tokens"] == told["token_accuracy"]
    numbers = [row["row"] for row in rows]
    assert numbers == sorted(set(numbers))
    before = (tmp_path / "rows.jsonl").read_bytes()
    words = ("evaluate", "--model", base, "--data", prepared(), "--per-row", tmp_path / "rows.jsonl", "--limit", 1)
    refused = command(*words)
    assert (refused.code, refused.stdout, (tmp_path / "rows.jsonl").read_bytes()) == (5, "", before)
    assert command(*words, "--overwrite").code == 0
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 1


def test_the_loss_is_the_one_that_training_reported(
    command: Command, base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """The run's last validation loss, of its adapter on the base and of the merged model."""
    from llamatune.checkpoints.merging import merge_lora
    from llamatune.command_options.inference import MergeOptions
    from llamatune.spec import build_spec
    from llamatune.training.train import train

    data = prepared(validation_fraction=0.3)
    train(build_spec({
        "model": {"path": str(base), "dtype": "float32"}, "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(data)},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 3, "precision": "fp32", "device": "cpu",
                     "learning_rate": 0.01, "micro_batch_size": 2},
        "evaluation": {"every_steps": 3},
    }, "test"))  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (reported,) = [event["loss"] for event in events if event["event"] == "eval" and event["step"]]
    merge_lora(MergeOptions(base, tmp_path / "run" / "adapter", tmp_path / "merged"))
    for model in (("--model", base, "--adapter", tmp_path / "run" / "adapter"), ("--model", tmp_path / "merged")):
        told = json.loads(command("evaluate", *model, "--data", data, "--json").stdout)
        assert told["split"] == "validation"
        assert told["loss"] == pytest.approx(reported, abs=1e-5)


def test_a_row_without_an_answer_is_exit_3_with_its_line(command: Command, base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "nine hills", "answer": "#### 9"}\n{"question": "and?"}\n')
    outcome = command("evaluate", "--model", base, "--task", "gsm8k", "--data", tmp_path / "rows.jsonl", "--json")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert f"{tmp_path / 'rows.jsonl'}:2" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_an_output_of_other_settings_is_exit_5_unless_overwritten(
    command: Command, base: Path, questions: Path, tmp_path: Path
) -> None:
    words = ("evaluate", "--model", base, "--task", "gsm8k", "--data", questions, "--output", tmp_path / "out.jsonl")
    assert command(*words, "--max-new-tokens", 5).code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    outcome = command(*words, "--max-new-tokens", 6, "--json")
    assert (outcome.code, outcome.stdout) == (5, "")
    assert "max_new_tokens" in outcome.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert command(*words, "--max-new-tokens", 6, "--overwrite").code == 0


def test_a_file_that_stands_where_the_settings_go_is_left_alone(
    command: Command, base: Path, questions: Path, tmp_path: Path
) -> None:
    words = ("evaluate", "--model", base, "--task", "gsm8k", "--data", questions, "--output", tmp_path / "out.jsonl")
    beside = tmp_path / "out.jsonl.settings.json"
    beside.write_text('{"mine": true}')
    refused = command(*words, "--max-new-tokens", 5)
    assert (refused.code, beside.read_text()) == (5, '{"mine": true}')
    assert not (tmp_path / "out.jsonl").exists()
    assert command(*words, "--max-new-tokens", 5, "--overwrite").code == 0


def test_lines_may_go_to_stdout_a_pipe_or_nowhere(
    command: Command, base: Path, questions: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    answering = ("evaluate", "--model", base, "--task", "gsm8k", "--data", questions, "--max-new-tokens", 5, "--output")
    assert command(*answering, tmp_path / "out.jsonl").code == 0
    scoring = ("evaluate", "--model", base, "--data", prepared(), "--per-row")
    assert command(*scoring, tmp_path / "rows.jsonl").code == 0
    os.mkfifo(tmp_path / "pipe")
    for words, name in ((answering, "out.jsonl"), (scoring, "rows.jsonl")):
        lines = (tmp_path / name).read_text()
        done = command(*words, "-")
        assert (done.code, done.stdout) == (0, lines), done.stderr
        assert command(*words, "/dev/null").code == 0
        received: list[str] = []
        reader = threading.Thread(target=lambda received=received: received.append((tmp_path / "pipe").read_text()))
        reader.start()
        assert command(*words, tmp_path / "pipe").code == 0
        reader.join()
        assert received == [lines]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.settings.json", "rows.jsonl", "pipe"}


def test_questions_that_may_pass_the_context_are_warned_of(command: Command, base: Path, questions: Path) -> None:
    done = command("evaluate", "--model", base, "--task", "gsm8k", "--data", questions, "--max-new-tokens", 256)
    assert done.stderr.count("can become more than the 256 tokens the model knows") == 1


def test_data_of_another_tokenizer_is_refused_unless_forced(
    command: Command, base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    model = bytearray((other / "tokenizer.model").read_bytes())
    (other / "tokenizer.model").write_bytes(model + b"\x8a\x06\x00")  # a field that nobody knows
    refused = command("evaluate", "--model", other, "--data", prepared())
    assert refused.code == 4, refused.stderr
    assert "another tokenizer" in refused.stderr
    assert command("evaluate", "--model", other, "--data", prepared(), "--force-base").code == 0
    (other / "tokenizer.model").unlink()
    unknown = command("evaluate", "--model", other, "--data", prepared())
    assert unknown.code == 0
    assert "has no tokenizer to compare" in unknown.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--task", "mmlu"), "no task is called 'mmlu'"),
        (("--shots", 3), "--shots"),
        (("--output", "out.jsonl"), "--output"),
        (("--overwrite",), "--overwrite"),
        (("--task", "gsm8k", "--split", "train"), "--split"),
        (("--task", "gsm8k", "--per-row", "rows.jsonl"), "--per-row"),
        (("--task", "gsm8k", "--shots", 3), "--shots-data"),
        (("--compare",), "--compare needs two models"),
        (("--dtype", "int4"), "--dtype"),
        (("--batch-size", 0), "--batch-size"),
        (("--limit", 0), "--limit"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(
    command: Command, words: tuple[object, ...], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command("evaluate", "--model", "absent", "--data", "absent", *words)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert part in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

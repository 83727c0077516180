"""The lines and tables of a run: before training, parts of epochs, and perplexities too large to read."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llamatune.commands import evaluate as evaluate_command
from llamatune.commands import train as train_command
from llamatune.commands._log_lines import KeyValueLines
from llamatune.commands._progress_bars import ProgressBars, open_console
from llamatune.commands._training_panel import TrainingPanel
from llamatune.events import Answer, AnswersDone, EpochDone, EvalDone, Event, RunStarted, StepDone
from llamatune.formats.summary_json import read_summary
from llamatune.units import perplexity

HIGH = 16.3  # its perplexity is 12 million


def _answers(step: int, text: str = 'four,\n"I think"\u2028') -> AnswersDone:
    return AnswersDone(step, (Answer(step, 1, "2 + 2 =", text, "4", 5, "eos"),), 0.5)


def _step(epoch: float, num_epochs: float, loss: float = 2.0) -> StepDone:
    return StepDone(
        step=1, total_steps=4, window=1, epoch=epoch, num_epochs=num_epochs, loss=loss, learning_rate=2e-4,
        grad_norm=1.25, loss_scale=1.0, target_tokens=4096, tokens_per_second=2.5, peak_memory_bytes=1, elapsed_s=1.5,
    )  # fmt: skip


def _epoch(number: int, num_epochs: float, loss: float = 2.0) -> EpochDone:
    return EpochDone(
        epoch=number, num_epochs=num_epochs, train_loss=loss, train_perplexity=perplexity(loss), elapsed_s=1.0,
        validation_loss=loss, validation_perplexity=perplexity(loss), epoch_s=0.0, evaluation_s=0.0, checkpoint_s=0.0,
        target_tokens=0, tokens_per_second=0.0,
    )  # fmt: skip


def _evaluation(step: int, loss: float = 2.0) -> EvalDone:
    return EvalDone(step, loss, perplexity(loss), seconds=1.25)


@pytest.mark.parametrize(
    ("event", "in_a_log", "on_a_terminal"),
    [
        (_evaluation(0), "eval step=0 loss=2.0000 perplexity=7.3891 seconds=1.2 before_training=true",
         "before training (1.2 s): validation loss 2.0000, perplexity 7.39"),
        (_evaluation(7), "eval step=7 loss=2.0000 perplexity=7.3891 seconds=1.2",
         "step 7: validation loss 2.0000, perplexity 7.39"),
        (_evaluation(7, HIGH), "eval step=7 loss=16.3000 perplexity=1.2e+07 seconds=1.2",
         "step 7: validation loss 16.3000, perplexity 1.2e+07"),
        (_evaluation(7, 800.0), "eval step=7 loss=800.0000 perplexity=1e+304 seconds=1.2",
         "step 7: validation loss 800.0000, perplexity 1e+304"),
        (_epoch(1, 3, HIGH), "epoch epoch=1/3 train_loss=16.3000 train_perplexity=1.2e+07 validation_loss=16.3000 "
         "validation_perplexity=1.2e+07", "epoch 1 of 3: train loss 16.3000, perplexity 1.2e+07"),
        (_answers(7), 'answer step=7 number=1 tokens=5 finish_reason=eos text="four,\\n\\"I think\\"\\u2028"\n', None),
        (_answers(0, "a" * 120), f'answer step=0 number=1 tokens=5 finish_reason=eos text="{"a" * 100}..."\n', None),
        (_epoch(2, 2.5), "epoch epoch=2/2.5 train_loss", "epoch 2 of 2.5: train"),
        (_epoch(3, 2.5), "epoch epoch=2.5/2.5 train_loss", "epoch 2.5 of 2.5: train"),
        (_epoch(1, 0.5), "epoch epoch=0.5/0.5 train_loss", "epoch 0.5 of 0.5: train"),
        (_step(0.25, 3), "train epoch=1/3 step=1/4", None),
        (_step(2.0, 3), "train epoch=2/3 step=1/4", None),
        (_step(0.25, 0.5), "train epoch=0.25/0.5 step=1/4", None),
        (_step(0.571428, 0.5), "train epoch=0.5/0.5 step=1/4", None),
        (_step(1.333333, 2.5), "train epoch=1.33/2.5 step=1/4", None),
    ],
)  # fmt: skip
def test_an_event_as_a_line(
    event: Event, in_a_log: str, on_a_terminal: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    KeyValueLines(1).draw(event)
    written = capsys.readouterr().err
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", written)
    assert written.partition(" ")[2].startswith(in_a_log)
    line = ProgressBars(open_console(io.StringIO()))._line(event)
    assert line is None if on_a_terminal is None else str(line).startswith(on_a_terminal)


def test_the_panel_keeps_the_loss_before_training_beside_the_later_ones() -> None:
    panel, shown = TrainingPanel(RunStarted(1, 1, 1, 1, 4, 0.5, 0, "cpu")), []
    for event in (_evaluation(0, HIGH), _step(0.25, 0.5, HIGH), _evaluation(1, 2.0)):
        panel.note(event)
        out = io.StringIO()
        open_console(out).print(panel)
        shown.append(" ".join(out.getvalue().split()))
    assert "16.3000, perplexity 1.2e+07 before training" in shown[0]
    assert "step 1 of 4, epoch 0.25 of 0.5" in shown[1]
    assert "16.3000, perplexity 1.2e+07" in shown[1]
    assert "2.0000, perplexity 7.39 at step 1; 16.3000 before training" in shown[2]


def test_tables_say_large_perplexities_shortly() -> None:
    out = io.StringIO()
    epoch = {"epoch": 1, "train_loss": HIGH, "train_perplexity": perplexity(HIGH), "validation_loss": HIGH,
             "validation_perplexity": perplexity(700.0), "epoch_s": 1.0, "tokens_per_second": 1.0}  # fmt: skip
    summary: dict[str, Any] = {
        "steps": 1, "runtime_s": 1.0, "tokens_per_second": 1.0, "device": "cpu", "peak_memory_bytes": 1,
        "peak_reserved_bytes": None, "trainable_parameters": 1, "total_parameters": 9, "best_eval_loss": 2.0,
        "best_step": 1, "start_eval_loss": 3.25, "epochs": [epoch], "output_dir": "run",
    }  # fmt: skip
    train_command._print_summary(open_console(out), summary, "run")
    payload = {"split": "train", "data": "d", "rows": 1, "target_tokens": 1, "dtype": "float32", "loss": HIGH,
               "perplexity": perplexity(HIGH)}  # fmt: skip
    evaluate_command._print_table(open_console(out), payload)
    evaluate_command._print_lines(open_console(out), payload)
    text = out.getvalue()
    assert text.count("1.2e+07") == 2
    assert "1e+304" in text
    assert "perplexity=1.1995e+07" in text
    assert "validation loss before training 3.2500" in " ".join(text.split())
    assert text.isascii(), "lines around tables are for terminals"


def test_a_summary_without_what_early_versions_did_not_record_is_shown(tmp_path: Path) -> None:
    """Each field that a file may leave out, alone and all of them; energy was measured without a mean power, too."""
    least = {
        "steps": 3, "train_loss": 1.5, "best_eval_loss": 2.0, "trainable_parameters": 5, "total_parameters": 50,
        "peak_memory_bytes": 1, "runtime_s": 1.0, "tokens_per_second": 1.0,
    }  # fmt: skip
    more = {"trainable_percent": 10.0, "device": "cpu", "best_step": 3, "output_dir": "out", "peak_reserved_bytes": 9,
            "energy_j": 40.0, "mean_power_w": 4.0, "start_eval_loss": 2.5}  # fmt: skip
    path, shown = tmp_path / "summary.json", {}
    for left_out in (*more, "all", "nothing"):
        kept = {key: value for key, value in more.items() if left_out not in (key, "all")}
        path.write_text(json.dumps({**least, **kept}))
        out = io.StringIO()
        train_command._print_summary(open_console(out), read_summary(path), "run")
        shown[left_out] = " ".join(out.getvalue().split())
        assert "5 (10.00 %)" in shown[left_out]
        assert "written to run" in shown[left_out]
        assert "None" not in shown[left_out]
    assert "peak memory, cpu" in shown["nothing"]
    assert "W on average" in shown["nothing"]
    assert "2.0000 (step 3)" in shown["nothing"]


def test_the_panel_shows_an_answer_on_one_line() -> None:
    panel, out = TrainingPanel(RunStarted(1, 1, 1, 1, 10, 3, 0, "cpu")), io.StringIO()
    panel.note(_answers(0))
    panel.note(_answers(7, "four\x1b[2J " + "a" * 200))
    open_console(out).print(panel)
    assert "an answer" in out.getvalue()
    assert f"2 + 2 = -> four\\x1b[2J {'a' * 71}..., at step 7" in " ".join(out.getvalue().replace("│", " ").split())

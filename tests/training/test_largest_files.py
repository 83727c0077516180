"""What a run writes it can read, however long it was: files that could grow are bounded, old ones are still read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from run_tools import keep_epochs_in_state, last_checkpoint, make_spec, metrics, progress_at, rewrite

from llamatune.errors import SpecError
from llamatune.events import EpochMeans
from llamatune.formats import metrics as metrics_room
from llamatune.formats.file_schema import LARGEST_FILE
from llamatune.formats.metrics import KEPT_EPOCHS, LayerGradNorms, MetricsLog, read_logged, read_metrics
from llamatune.formats.metrics_lines import check_line, parse_line
from llamatune.formats.origin_json import dump_origin, read_origin
from llamatune.formats.state_json import read_progress, write_progress
from llamatune.formats.summary_json import read_summary, write_summary
from llamatune.reporting.run_reader import read_run
from llamatune.training import save_and_resume
from llamatune.training.run_directory import refuse_output
from llamatune.training.train import train
from llamatune.verification import verify

LONG = 1.2345678901234567e-300
SHA = "0123456789abcdef" * 4


def closed(number: int) -> EpochMeans:
    """An epoch with as many digits as there can be."""
    return EpochMeans(number, *[LONG] * 7, target_tokens=(1 << 53) - 1, tokens_per_second=LONG)


def summary(epochs: int) -> dict[str, Any]:
    whole = (1 << 53) - 1
    rank = {"peak_memory_bytes": whole, "tokens_per_second": LONG, "wait_share": LONG}
    return {
        "steps": whole, "train_loss": LONG, "best_eval_loss": LONG, "best_step": whole, "trainable_parameters": whole,
        "total_parameters": whole, "peak_memory_bytes": whole, "runtime_s": LONG, "tokens_per_second": LONG,
        "epochs": [asdict(closed(number)) for number in range(whole - epochs, whole)], "output_dir": "d" * 4096,
        "ranks": [rank] * 4096,
    }  # fmt: skip


def test_the_largest_summary_is_read_back(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", summary(KEPT_EPOCHS))
    assert (tmp_path / "summary.json").stat().st_size < LARGEST_FILE // 8
    assert read_summary(tmp_path / "summary.json")["epochs"][-1] == asdict(closed((1 << 53) - 2))


def test_the_largest_state_is_read_back(tmp_path: Path) -> None:
    """It has no list that grows; the base's files are at most some hundreds."""
    names = {f"model-{number:05d}-of-01000.safetensors": {"bytes": 1 << 50, "sha256": SHA} for number in range(1000)}
    saved = progress_at((1 << 52), base_files=names, torch="t" * 4096)
    write_progress(tmp_path, saved)
    assert (tmp_path / "state.json").stat().st_size < LARGEST_FILE // 8
    assert read_progress(tmp_path) == saved


def test_the_longest_line_of_a_log_is_read_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(LayerGradNorms(1, {f"layers.{number}": LONG for number in range(10_000)}))
    log.close()
    (line,) = log.path.read_bytes().splitlines(keepends=True)
    assert check_line(parse_line(line))
    assert len(read_metrics(log.path).layer_grad_norms[1]) == 10_000


def test_an_origin_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    values = {"base": SHA, "train": [SHA] * 1000, "validation": None}
    change = {"field": "data.train", "old": ["d" * 200] * 1000, "new": ["e" * 200] * 1000}
    (tmp_path / "origin.json").write_bytes(dump_origin(tmp_path, {**values, "spec_changes": [change] * 30}))
    assert len(read_origin(tmp_path / "origin.json").spec_changes) == 30
    with pytest.raises(SpecError, match="changed so often"):
        dump_origin(tmp_path, {**values, "spec_changes": [change] * 50})


def test_a_spec_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    """Written out, a list of directories takes more bytes than in one line of the user's file."""
    spec = make_spec(Path("base"), Path("data"), tmp_path / "run", data__train=[f"d{n}" for n in range(120_000)])
    with pytest.raises(SpecError, match="written out it has"):
        refuse_output(spec, overwrite=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def run_of(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """A run of windows that are epochs."""
    whole = {"training__gradient_accumulation_steps": 64, "training__micro_batch_size": 8}
    data = prepared(validation_fraction=0.25, seed=3)
    return lambda epochs, **changes: make_spec(
        tiny_base(), data, tmp_path / "run", training__num_epochs=epochs, **{**whole, **changes}
    )


def test_neither_state_nor_summary_grows_with_the_epochs(
    run_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for room in (metrics_room, save_and_resume):
        monkeypatch.setattr(room, "KEPT_EPOCHS", 3)
    found = train(run_of(5, training__keep_last=9))
    assert [epoch["epoch"] for epoch in found["epochs"]] == [3, 4, 5]
    logged = metrics(tmp_path / "run", "epoch")
    assert [epoch["epoch"] for epoch in logged] == [1, 2, 3, 4, 5]
    assert [{"event": "epoch", **epoch} for epoch in found["epochs"]] == logged[2:]
    states = [json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("checkpoints/*/state.json"))]
    assert len(states) == 5
    assert not any("epochs" in state["position"] for state in states)
    more = train(run_of(7, training__keep_last=9))  # the last ones, of both processes
    assert [epoch["epoch"] for epoch in more["epochs"]] == [5, 6, 7]
    assert more["epochs"][0]["train_loss"] == found["epochs"][-1]["train_loss"]
    assert len(metrics(tmp_path / "run", "epoch")) == 7


def test_a_run_of_an_earlier_version_with_all_its_epochs_is_read_and_gone_on_with(
    run_of: Callable[..., Any], tmp_path: Path
) -> None:
    """Its state and its summary are of more than a MiB, which versions before could not read any more."""
    run = tmp_path / "run"
    spec = run_of(2)
    train(spec)
    checkpoint = last_checkpoint(run)
    keep_epochs_in_state(checkpoint)

    def note_epoch(state: dict[str, Any]) -> None:
        state["position"]["epochs"] = [asdict(closed(1))]

    rewrite(checkpoint, note_epoch)
    (run / "summary.json").unlink()
    again = train(spec)
    assert [epoch["epoch"] for epoch in again["epochs"]] == [1, 2]
    assert again["epochs"][0] == asdict(closed(1))
    assert json.loads((run / "summary.json").read_text()) == again
    values = json.loads((run / "summary.json").read_text())
    values["epochs"] = [asdict(closed(number)) for number in range(1, 5001)]
    (run / "summary.json").write_text(json.dumps(values, indent=2))
    assert (run / "summary.json").stat().st_size > 1 << 20
    assert verify(run).finished
    assert len(read_run(run, "run").summary["epochs"]) == 5000
    assert len(train(spec)["epochs"]) == 5000
    lines = (run / "metrics.jsonl").stat().st_size
    assert read_logged(run / "metrics.jsonl", lines).steps == 2


@pytest.mark.slow
def test_thousands_of_epochs_are_in_order(run_of: Callable[..., Any], tmp_path: Path) -> None:
    """As many as no reader could read when the summary held them all."""
    found = train(run_of(3200, training__save_every_steps=400, evaluation__every_steps=400))
    assert len(found["epochs"]) == KEPT_EPOCHS
    assert verify(tmp_path / "run").steps == 3200
    assert read_run(tmp_path / "run", "run").status == "finished"
    assert (last_checkpoint(tmp_path / "run") / "state.json").stat().st_size < 4096
    assert (tmp_path / "run" / "summary.json").stat().st_size < 1 << 20

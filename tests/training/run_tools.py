"""Short ways to describe a run, to interrupt it, and to read what it left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llamatune.events import EvalDone, Event, Progress, RunStarted, StepDone, StepSkipped
from llamatune.formats.state_json import SavedState
from llamatune.spec import RunSpec, build_spec
from llamatune.training.train import train
from llamatune.training.trainer_state import TrainerState

REPEATABLE = ("event", "step", "window", "epoch", "loss", "learning_rate", "grad_norm", "loss_scale", "perplexity",
              "target_tokens", "rows", "best", "number", "prompt", "answer", "reference", "finish_reason")  # fmt: skip


def spec_values(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of LoRA with dropout in fp32, micro-batches of 3 and windows of 6 rows.

    ``changes`` are ``section__key=value``, or a whole section; ``lora=None`` trains every parameter.
    """
    values: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": str(data)},
        "training": {
            "output_dir": str(output),
            "num_epochs": 1,
            "micro_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "precision": "fp32",
            "device": "cpu",
        },
        "evaluation": {},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if not key:
            values[section] = value
        else:
            values[section][key] = value
    if values["training"].get("max_steps") is not None:
        values["training"].pop("num_epochs", None)
    if values["lora"] is None:
        del values["lora"]
    return values


def make_spec(base: Path, data: Path, output: Path, **changes: Any) -> RunSpec:
    return build_spec(spec_values(base, data, output, **changes), "test")


def metrics(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, of one kind if it is named."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "step")]


def adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def files(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, the lock apart (it tells who held it last)."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None], name: str = "state.json") -> None:
    """Change a JSON file of a product, and its digest in the manifest with it."""
    file, manifest = checkpoint / name, checkpoint / "llamatune.json"
    values, facts = json.loads(file.read_text()), json.loads(manifest.read_text())
    change(values)
    file.write_text(json.dumps(values))
    facts.pop("sha256", None)  # of the manifest itself
    facts["files"][name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(facts))


def progress_at(step: int, **facts: Any) -> SavedState:
    """``state.json`` after so many steps, of which nothing else is known."""
    position = TrainerState(step=step, window=step, saved_window=step, saved_step=step)
    values = {"step": step, "position": asdict(position), "scaler": {}, "metrics_bytes": 0}
    return SavedState.model_validate({**values, **facts})


def keep_epochs_in_state(checkpoint: Path, schema: int = 2) -> None:
    """As versions before schema 3 left a run: the epochs in the state of its last checkpoint, none in the log."""
    log = checkpoint.parents[1] / "metrics.jsonl"
    length = json.loads((checkpoint / "state.json").read_text())["metrics_bytes"]
    lines = log.read_bytes()[:length].splitlines(keepends=True)
    closed = [json.loads(line) for line in lines if b'"event": "epoch"' in line]
    others = b"".join(line for line in lines if b'"event": "epoch"' not in line)
    log.write_bytes(others)

    def change(state: dict[str, Any]) -> None:
        state.update(schema=schema, metrics_bytes=len(others))
        state["position"]["epochs"] = [{key: epoch[key] for key in epoch if key != "event"} for epoch in closed]

    rewrite(checkpoint, change)


_CARDS = ("README.md", "llamatune.json")


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that must come out the same, however often it was interrupted."""
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    kept = ("steps", "train_loss", "best_eval_loss", "best_step", "skipped_windows", "stopped_early")
    timed = ("epoch_s", "evaluation_s", "checkpoint_s", "tokens_per_second")
    products = {f"{kind}/{name}": x for kind in ("adapter", "best", "model") for name, x in files(run / kind).items()}
    return {
        "metrics": [{key: line[key] for key in REPEATABLE if key in line} for line in metrics(run)],
        "summary": {key: summary[key] for key in kept},
        "epochs": [{key: value for key, value in epoch.items() if key not in timed} for epoch in summary["epochs"]],
        "scaler": state["scaler"],
        "optimizer": (last_checkpoint(run) / "optimizer.safetensors").read_bytes(),
        **products,
    }


def assert_same_outcome(found: Path, expected: Path, *, cards: bool = True) -> None:
    """``cards``: also the model cards, which say what the specs say, and their digests."""
    ours, theirs = outcome(found), outcome(expected)
    assert ours["metrics"] == theirs["metrics"]
    assert ours["summary"] == theirs["summary"]
    assert ours["epochs"] == theirs["epochs"]
    compared = {name for name in ours.keys() | theirs.keys() if cards or Path(name).name not in _CARDS}
    differing = [name for name in compared if ours.get(name) != theirs.get(name)]
    assert not differing, f"not the same bytes: {sorted(differing)}"


class StopAfter:
    """Asks for a stop once so many windows and validation batches have passed, without those before the first step."""

    def __init__(self, count: int) -> None:
        self.left, self._begun = count, False

    def on_event(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._begun = not event.evaluates_first
            case EvalDone():
                self._begun = True
            case StepDone() | StepSkipped():
                self.left -= 1
            case Progress("evaluating"):
                self.left -= self._begun

    def should_stop(self) -> bool:
        return self.left <= 0


class Crash(BaseException):
    """A process that dies; what stands on the disk is all that is left."""


def crash_at(number: int) -> Callable[[Event], None]:
    """An observer that lets the run die at its ``number``-th event, from 0."""
    seen = iter(range(number + 1))

    def on_event(event: Event) -> None:
        if next(seen) == number:
            raise Crash

    return on_event


def run_and_record(spec: RunSpec) -> tuple[dict[str, Any], list[Event]]:
    events: list[Event] = []
    return train(spec, on_event=events.append), events

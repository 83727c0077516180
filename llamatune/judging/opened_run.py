"""The base and the tuned weights of a run, opened by its spec, and the prepared rows that it is judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llamatune.command_options.inference import ModelSource
from llamatune.command_options.judge import JudgeOptions
from llamatune.data.batches import Prepared, Split, open_prepared
from llamatune.errors import CheckpointError, DataError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.formats.origin_json import read_origin
from llamatune.formats.prepared import verify_rows
from llamatune.inference.model_source import OpenedModel, open_model
from llamatune.reporting.run_reader import Run
from llamatune.training.run_file_names import ADAPTER, BEST, MODEL, ORIGIN

_STARTED = "run judge where the run was started, or give --model and --data"


@dataclass(frozen=True)
class Sides:
    """Base and tuned model: one ``opened`` that compares the two, or the base and the tuned one, each by its prefix.

    ``weights`` is the directory of what was trained.
    """

    weights: Path
    opened: dict[str, OpenedModel]

    @property
    def tuned(self) -> OpenedModel:
        return self.opened[""]


def open_sides(run: Run, options: JudgeOptions, on_event: OnEvent) -> Sides:
    """Open what ``run`` trained and its base.

    Raises:
        SpecError: the run did not train the model on the disk.
        CheckpointError: no weights yet, or they cannot be used.
    """
    spec = run.spec
    if spec.model.init == "random" or spec.model.num_layers is not None:
        raise SpecError(
            "its base is not the model on the disk", run.path, "judge a run with model.init: pretrained and all layers"
        )
    weights = run.path / (BEST if options.best else ADAPTER if spec.lora is not None else MODEL)
    if not weights.is_dir():
        todo = "leave --best out" if options.best else "let the run finish"
        raise CheckpointError("no trained weights yet", weights, todo)
    base = options.model or Path(spec.model.path)
    if not base.exists():
        raise CheckpointError("no such directory", base, _STARTED)
    source = ModelSource(
        base,
        dtype=options.dtype or spec.model.dtype,
        device=options.device,
        placement=options.placement,
        force_base=options.force_base,
        variant=spec.model.variant,
    )
    if spec.lora is not None:
        return Sides(weights, {"": open_model(replace(source, adapter=weights, compare=True), on_event)})
    tuned = open_model(replace(source, model=weights, variant=None), on_event)
    opened = {"base_": open_model(source, on_event), "": tuned}
    if opened["base_"].config.vocab_size != tuned.config.vocab_size:
        raise CheckpointError("the run was trained on another base, of another vocabulary", base, "give its own base")
    return Sides(weights, opened)


@dataclass(frozen=True)
class TaskRows:
    """Rows that the task's loss is measured on, where they come from, and the training rows.

    ``train`` None: the run's training data is no longer there.
    """

    data: str
    split: str
    rows: Split
    prepared: Prepared
    train: Split | None


def open_task_rows(run: Run, data: Path | None, on_event: OnEvent) -> TaskRows:
    """The rows of ``data``, else the run's validation rows, else its training rows, with a warning.

    Raises:
        DataError: no prepared directory, one that was altered, or without rows; another one than the run read.
    """
    training, validation = run.spec.data.train_paths, run.spec.data.validation_paths
    named = {"train": training, "validation": () if data is not None else validation}
    faults = {name: fault for name, paths in named.items() if (fault := _replaced(run, name, paths))}
    if faults and data is None:
        what, where = next(iter(faults.values()))
        raise DataError(what, where, _STARTED)
    if faults:
        on_event(Notice(f"{faults['train'][1]}: {faults['train'][0]}, so overlap with them is not computed", "warning"))
    train = None if faults else open_prepared(*training).train
    paths, split = (data,) if data is not None else validation or training, "train"
    verify_rows(*paths)
    prepared = open_prepared(*paths)
    rows = prepared.train
    if data is None and validation:
        split = "validation"
    elif prepared.validation is not None and len(prepared.validation):
        split, rows = "validation", prepared.validation
    elif data is None:
        what = "the run has no validation rows, so the task's loss is that of its training rows"
        on_event(Notice(f"{run.path}: {what}: it tells how well they are remembered", "warning"))
    if not len(rows):
        raise DataError("no rows", paths[0], "give other rows with --data")
    return TaskRows(", ".join(map(str, paths)), split, rows, prepared, train)


def _replaced(run: Run, name: str, paths: tuple[Path, ...]) -> tuple[str, Path] | None:
    """Why the rows at ``paths`` are not those that the run read, and where; None: they are."""
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        return "no such directory", missing
    if not paths or not (run.path / ORIGIN).exists():
        return None
    recorded = read_origin(run.path / ORIGIN).inputs[name]
    if recorded is not None and open_prepared(*paths).digest != recorded:
        return "other rows than the run's are there now", paths[0]
    return None

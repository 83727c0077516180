"""Cells of a benchmark: the spec and identity of each, or why it cannot be run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from llamatune import __version__
from llamatune.benchmarking.cell_runs import PlannedCell
from llamatune.benchmarking.grid import preset_grid
from llamatune.benchmarking.measure_cell import Task
from llamatune.benchmarking.results import Work
from llamatune.command_options.training import BenchmarkOptions
from llamatune.devices import find_device
from llamatune.errors import LlamatuneError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.safe_reading import digest_bytes
from llamatune.spec import RunSpec, load_spec
from llamatune.spec_grid import Cell, Grid, expand, parse_axis
from llamatune.spec_overrides import refuse_twice
from llamatune.spec_sections import DEFAULT_EPOCHS
from llamatune.strict_yaml import read_yaml
from llamatune.threads import threads_for
from llamatune.training.inputs import Inputs, open_inputs
from llamatune.training.schedule import pass_tokens

_MEASURED = "memory of the heaviest rows of the data"
"""How; a cell that was measured otherwise is measured again."""


def plan_benchmark(options: BenchmarkOptions, on_event: OnEvent) -> tuple[Grid, list[PlannedCell]]:
    """Make every cell's spec and open its inputs, on the CPU: the GPU is left to the cells' processes.

    Raises:
        LlamatuneError: the spec is invalid, or no cell has a valid spec and inputs that can be opened.
    """
    if options.spec_path is None:
        raise SpecError("no run spec", None, "give one, or --generate with --model")
    base = load_spec(options.spec_path, list(options.overrides))
    refuse_twice([*options.overrides, *options.grid])
    axes = [parse_axis(text) for text in options.grid]
    preset = options.preset_grid or (None if axes else "techniques")
    grid = Grid(())
    if preset is not None:
        grid = preset_grid(preset, cuda=find_device(base.training.device, on_event).type == "cuda")
    grid = grid.with_axes(axes)
    overrides = [*options.overrides, f"training.output_dir={json.dumps(str(options.output))}"]
    if options.epochs is not None:
        overrides += [f"training.num_epochs={options.epochs}", "training.max_steps="]
    cells = expand(read_yaml(options.spec_path), options.spec_path, overrides, grid)
    return grid, _planned(cells, options, on_event)


def _planned(cells: list[Cell], options: BenchmarkOptions, on_event: OnEvent) -> list[PlannedCell]:
    opened: dict[str, Inputs | LlamatuneError] = {}
    notices: set[Notice] = set()
    work = options.work

    def once(event: Any) -> None:
        if event not in notices:
            notices.add(event)
            on_event(event)

    planned = []
    for cell in cells:
        if cell.spec is None:
            planned.append(PlannedCell(cell))
            continue
        key = cell.spec.model_dump_json(exclude={"training"})  # all that decides which files are read
        if key not in opened:
            opened[key] = _open(cell.spec, once)
        if isinstance(inputs := opened[key], LlamatuneError):
            planned.append(PlannedCell(replace(cell, refusal=str(inputs))))
            continue
        seeds = options.seeds or (cell.spec.training.seed,)
        task = Task(cell.spec, options.updates, seeds, options.memory_limit_bytes)
        lengths = inputs.prepared.train.lengths
        work = work or _whole_work(options, cell.spec, len(lengths))
        tokens = round(work[0] * work[1] * sum(lengths) / len(lengths))
        planned.append(PlannedCell(cell, task, _identity(task, inputs), len(seeds), Work(*work, tokens)))
    faults = [fault for fault in opened.values() if isinstance(fault, LlamatuneError)]
    if len(faults) == len(opened):
        raise faults[0]
    return planned


def _whole_work(options: BenchmarkOptions, spec: RunSpec, rows: int) -> tuple[int, float]:
    """All rows of the first cell, as often as its run has them, or once where its length is given in steps."""
    epochs = options.epochs or spec.training.num_epochs or (1 if spec.training.max_steps else DEFAULT_EPOCHS)
    return rows, epochs


def _open(spec: RunSpec, on_event: OnEvent) -> Inputs | LlamatuneError:
    on_cpu = spec.training.model_copy(update={"device": "cpu", "precision": "fp32"})
    try:
        return open_inputs(spec.model_copy(update={"training": on_cpu}), False, on_event)
    except LlamatuneError as fault:
        return fault


def _identity(task: Task, inputs: Inputs) -> str:
    no_part: Any = {"training": {"output_dir"}, "evaluation": {"at_start"}, "tracking": True}
    spec = task.spec.model_dump(mode="json", exclude=no_part)
    threads = threads_for(inputs.config, pass_tokens(task.spec, inputs.prepared.train))
    decisive: list[Any] = [spec, task.steps, task.seeds, task.memory_limit_bytes, inputs.digests]
    decisive += [__version__, torch.__version__, threads, _MEASURED]
    return digest_bytes(json.dumps(decisive, sort_keys=True).encode())[:20]

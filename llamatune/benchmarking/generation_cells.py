"""Cells of a benchmark of generation: the task and identity of each, or why it cannot be run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any, cast

import torch

from llamatune import __version__
from llamatune.benchmarking.cell_runs import PlannedCell
from llamatune.benchmarking.measure_generation import GenerationTask
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.command_options import generation_grid as defaults
from llamatune.command_options.inference import HeldDtype, ModelSource
from llamatune.command_options.training import BenchmarkOptions
from llamatune.devices import find_device
from llamatune.errors import SpecError
from llamatune.events import Event, Notice, OnEvent, ignore_event
from llamatune.inference.model_source import open_model
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.processor import processor_name
from llamatune.safe_reading import digest_bytes
from llamatune.spec_grid import Axis, Cell
from llamatune.threads import threads_for

ADAPTER, DTYPE, PROMPT_TOKENS, NEW_TOKENS, ROWS = "adapter", "dtype", "prompt_tokens", "new_tokens", "rows"
"""Keys of the axes. ``adapter`` is on or off."""


def plan_generation_cells(options: BenchmarkOptions, on_event: OnEvent) -> tuple[tuple[Axis, ...], list[PlannedCell]]:
    """A cell for every combination, the last axis varying fastest. The GPU is left to the cells' processes.

    Raises:
        LlamatuneError: no model is named, the device is absent, or model or adapter cannot be used.
    """
    if options.model is None:
        raise SpecError("--generate needs a model", None, "give its directory with --model")
    device = options.device or "auto"
    on_cpu = find_device(device, on_event).type == "cpu"
    base = ModelSource(model=options.model, device=device)
    sources = {"off": base}
    if options.adapter is not None:
        sources["on"] = replace(base, adapter=options.adapter, force_base=options.force_base)
    # Of the last one, which tells all that the base alone does, too.
    told = [ignore_event] * (len(sources) - 1) + [on_event if on_cpu else _warnings_of(on_event)]
    opened = {
        switch: open_model(replace(source, device="cpu"), tell)
        for (switch, source), tell in zip(sources.items(), told, strict=True)
    }
    stored = opened["off"]
    same = stored.dtype_name if on_cpu else DTYPE_NAMES[stored.checkpoint.dtype("model.embed_tokens.weight")]
    axes = _axes(options, same)
    planned = []
    for chosen in itertools.product(*(axis.values for axis in axes)):
        values = {axis.key: value for axis, value in zip(axes, chosen, strict=True)}
        switch = values.get(ADAPTER, "off")
        model, source = opened[switch], replace(sources[switch], dtype=cast(HeldDtype, values[DTYPE]))
        prompt, new, rows = (int(values[key]) for key in (PROMPT_TOKENS, NEW_TOKENS, ROWS))
        known = model.config.max_position_embeddings
        if prompt + new > known:
            what = f"{prompt + new:,} tokens of prompt and completion are more than the {known:,} that the model knows"
            planned.append(PlannedCell(Cell(values, refusal=what)))
            continue
        task = GenerationTask(source, rows, prompt, new, options.repetitions or defaults.REPETITIONS)
        decisive: list[Any] = [*values.values(), task.repetitions, device, on_cpu, fingerprint(stored.checkpoint)]
        decisive += [[adapter.digest for adapter in model.adapters], threads_for(model.config, rows)]
        decisive += [__version__, torch.__version__, processor_name()]
        planned.append(PlannedCell(Cell(values), task, digest_bytes(json.dumps(decisive).encode())[:20]))
    return axes, planned


def _axes(options: BenchmarkOptions, same: str) -> tuple[Axis, ...]:
    """Those of the options; ``same`` is what the weights are held in by default."""
    held = (same if name == "same" else name for name in options.dtype or defaults.DTYPES)
    values: dict[str, tuple[Any, ...]] = {
        ADAPTER: ("off", "on") if options.adapter is not None else (),
        DTYPE: tuple(dict.fromkeys(held)),
        PROMPT_TOKENS: options.prompt_tokens or defaults.PROMPT_TOKENS,
        NEW_TOKENS: options.new_tokens or defaults.NEW_TOKENS,
        ROWS: options.rows or defaults.ROWS,
    }
    return tuple(Axis(key, tuple(map(str, several))) for key, several in values.items() if several)


def _warnings_of(on_event: OnEvent) -> OnEvent:
    """``on_event`` for warnings alone: the notices are about the CPU, and the cells run on a GPU."""

    def told(event: Event) -> None:
        if not isinstance(event, Notice) or event.kind == "warning":
            on_event(event)

    return told

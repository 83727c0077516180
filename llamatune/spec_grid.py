"""A grid of run specs: axes, and a cell for every combination of their values. No torch."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamatune.errors import SpecError
from llamatune.spec import RunSpec, build_spec, value_fault

LORA, BATCH = "lora", "batch"
"""The two axes that are not fields of the spec: ``on`` or ``off``, and micro-batch x accumulation as in ``1x8``."""

_LORA_VALUES = {"null": "off", "{}": "on"}
_SHORT = {
    "training.activation_checkpointing": "checkpointing",
    "training.gradient_accumulation_steps": "accumulation",
    "training.micro_batch_size": "micro-batch",
    "prompt_tokens": "prompt tokens",
    "new_tokens": "new tokens",
}
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
_BATCH_VALUE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Axis:
    """A key path of the spec, or ``lora``, or ``batch``, and its values; others are compared with the first."""

    key: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The heading of its column."""
        return short_name(self.key)


@dataclass(frozen=True)
class Cell:
    """One combination: the value of each axis by its key, and the spec of its run, or why it has none.

    A cell of generation has no run.
    """

    values: Mapping[str, str]
    spec: RunSpec | None = None
    refusal: str | None = None

    @property
    def label(self) -> str:
        return in_words(self.values) or "the spec"


def short_name(key: str) -> str:
    """The key without its section, or a shorter name."""
    return _SHORT.get(key, key.rpartition(".")[2])


def in_words(values: Mapping[str, str]) -> str:
    """``lora=on, precision=bf16``"""
    return ", ".join(f"{short_name(key)}={value}" for key, value in values.items())


@dataclass(frozen=True)
class Grid:
    """Axes, and ``fixed`` overrides of every cell's spec."""

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...] = ()

    def with_axes(self, axes: Sequence[Axis]) -> Grid:
        """Replace axes of the same key and append the others."""
        return replace(self, axes=tuple({axis.key: axis for axis in (*self.axes, *axes)}.values()))


def is_axis(text: str) -> bool:
    """Whether ``KEY=VALUE`` is an axis: it has several values, or is no override of the spec, as ``lora=null`` is."""
    key, _, values = text.partition("=")
    return key == BATCH or (key == LORA and values in ("on", "off")) or _COMMA.search(values) is not None


def parse_axis(text: str) -> Axis:
    """``KEY=V1,V2``; commas within brackets belong to a value."""
    key, separator, values = text.partition("=")
    parsed = tuple(value.strip() for value in _COMMA.split(values))
    if not separator or not key or not all(parsed):
        raise SpecError(f"{text!r} is no axis", "--grid", "write KEY=V1,V2 as in training.precision=fp32,bf16")
    if len(set(parsed)) != len(parsed):
        raise SpecError("names a value twice", f"--grid {text}")
    if key == LORA:
        parsed = tuple(_LORA_VALUES.get(value, value) for value in parsed)  # as an override of train has it
    if key == LORA and not set(parsed) <= {"on", "off"}:
        raise SpecError("lora is on or off", f"--grid {text}", "its fields are axes too, as lora.r=4,16")
    if key == BATCH and not all(_BATCH_VALUE.fullmatch(value) for value in parsed):
        raise SpecError("batch is micro-batch x accumulation", f"--grid {text}", "write batch=1x1,8x1,1x8")
    if key not in (LORA, BATCH) and "." not in key:
        raise SpecError(f"{key!r} is no key of the spec", f"--grid {text}", "write section.key, lora or batch")
    return Axis(key, parsed)


def expand(values: dict[str, Any], where: object, overrides: Sequence[str], grid: Grid) -> list[Cell]:
    """A cell for every combination, the last axis varying fastest. ``values`` are those of the spec file.

    ``overrides`` are the user's, applied after the grid's own and before the axes' values.

    Raises:
        SpecError: a key has no such value, whatever the others are; or no combination is a valid spec: it has the
            reason of the first.
    """
    for axis in grid.axes:
        for value in () if axis.key in (LORA, BATCH) else axis.values:
            if fault := value_fault(f"{axis.key}={value}"):
                raise SpecError(f"no value of an axis: {fault}", f"--grid {axis.key}={','.join(axis.values)}")
    cells = []
    for chosen in itertools.product(*(axis.values for axis in grid.axes)):
        settings = {axis.key: value for axis, value in zip(grid.axes, chosen, strict=True)}
        try:
            spec = _build_spec(copy.deepcopy(values), where, [*grid.fixed, *overrides], settings)
            cells.append(Cell(settings, spec))
        except SpecError as fault:
            cells.append(Cell(settings, None, str(fault)))
    if all(cell.spec is None for cell in cells):
        raise SpecError(f"no cell of the grid is a valid spec: {cells[0].refusal}")
    return cells


def _build_spec(values: dict[str, Any], where: object, overrides: list[str], settings: Mapping[str, str]) -> RunSpec:
    assignments = [f"{key}={value}" for key, value in settings.items() if key not in (LORA, BATCH)]
    if BATCH in settings:
        micro, accumulated = batch_sizes(settings[BATCH])
        assignments += [f"training.micro_batch_size={micro}", f"training.gradient_accumulation_steps={accumulated}"]
    if settings.get(LORA) == "on" and values.get("lora") is None:
        values["lora"] = {}
    if settings.get(LORA) == "off":
        values.pop("lora", None)
        overrides = [override for override in overrides if not override.startswith("lora.")]
        if meaningless := [key for key in settings if key.startswith("lora.")]:
            raise SpecError(f"{meaningless[0]} says nothing with lora=off")
    return build_spec(values, where, [*overrides, *assignments])


def batch_sizes(value: str) -> tuple[int, int]:
    """Micro-batch and accumulation of ``1x8``."""
    micro, _, accumulated = value.partition("x")
    return int(micro), int(accumulated)

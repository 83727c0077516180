"""The runs of a sweep: a name, a directory and a spec for every combination of values. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.sweep import SweepOptions
from llamatune.errors import SpecError
from llamatune.safe_reading import digest_bytes
from llamatune.spec import RunSpec, load_spec
from llamatune.spec_grid import Axis, Grid, expand, is_axis, parse_axis, short_name
from llamatune.spec_overrides import refuse_twice
from llamatune.strict_yaml import read_yaml
from llamatune.training.run_directory import refuse_inputs
from llamatune.training.run_file_names import RUNS

_OUTPUT = "training.output_dir"
_LONGEST_NAME = 100
_KEPT = re.compile(r"[^A-Za-z0-9._=,+-]+")


@dataclass(frozen=True)
class Member:
    """A run of the sweep: the value of each axis by its key, and the spec, or why there is none."""

    name: str
    values: Mapping[str, str]
    path: Path
    spec: RunSpec | None
    refusal: str | None = None


def plan_members(options: SweepOptions) -> tuple[tuple[Axis, ...], list[Member]]:
    """The axes, and a member for every combination of their values, the last axis varying fastest.

    Raises:
        SpecError: the spec or an axis is wrong, there is no axis, or no combination is a valid spec.
    """
    fixed = [text for text in options.overrides if not is_axis(text)]
    texts = [*options.grid, *(text for text in options.overrides if is_axis(text))]
    if not texts:
        raise SpecError("nothing to try", "--grid", "name a field and its values, as training.learning_rate=1e-4,3e-4")
    load_spec(options.spec_path, fixed)  # the spec's own faults first
    refuse_twice([*fixed, *texts])
    axes = tuple(parse_axis(text) for text in texts)
    for key in (text.partition("=")[0] for text in (*texts, *fixed)):
        if key == _OUTPUT:
            raise SpecError(f"{_OUTPUT} is set by --output", None, "leave it out: each run gets a directory there")
    cells = expand(read_yaml(options.spec_path), options.spec_path, fixed, Grid(axes))
    names = member_names([cell.values for cell in cells])
    members = []
    for cell, name in zip(cells, names, strict=True):
        path, spec = options.output / RUNS / name, cell.spec
        if spec is not None:
            training = spec.training.model_copy(update={"output_dir": str(path)})
            spec = spec.model_copy(update={"training": training})
            refuse_inputs(spec, "--output", options.overwrite)
        members.append(Member(name, dict(cell.values), path, spec, cell.refusal))
    return axes, members


def member_names(combinations: Iterable[Mapping[str, str]]) -> list[str]:
    """``r=8,learning_rate=1e-4`` for each combination: a function of its values alone, so that a sweep can grow.

    What a file's name should not hold is replaced; then a digest of the values keeps names apart.
    """
    return [_name(values) for values in combinations]


def _name(values: Mapping[str, str]) -> str:
    times = Counter(map(short_name, values))
    texts = {key if times[short_name(key)] > 1 else short_name(key): value for key, value in values.items()}
    whole = ",".join(f"{name}={value}" for name, value in texts.items())
    name = _KEPT.sub("-", whole)
    if name == whole and len(name) <= _LONGEST_NAME:
        return name
    digest = digest_bytes(json.dumps(dict(values), sort_keys=True).encode())[:8]
    return f"{name[:_LONGEST_NAME]}-{digest}"

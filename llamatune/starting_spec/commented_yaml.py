"""The text of a first run spec: a head that says what it is for, and each key with its reason behind it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llamatune.errors import printable
from llamatune.spec_schema import EDITOR_LINE
from llamatune.starting_spec.choosing import Chosen
from llamatune.units import gibibytes

SCHEMA_NAME = "llamatune.schema.json"
_WIDTH, _COLUMN = 118, 42


def commented_spec(chosen: Chosen, prepare: str | None, name: Path | None) -> str:
    """The YAML text. ``prepare``: the command that comes first, where there is one; ``name``: of the file."""
    lines = [EDITOR_LINE.format(SCHEMA_NAME), *_head(chosen, prepare, name or Path("run.yaml"))]
    for section, values in chosen.values.items():
        lines.append(f"{section}:")
        for key, value in values.items():
            lines += _entry(f"  {key}: {_scalar(value)}", chosen.reasons.get(f"{section}.{key}", ""))
    return "\n".join(lines) + "\n"


def _head(chosen: Chosen, prepare: str | None, name: Path) -> Iterator[str]:
    plan, device, rows = chosen.plan, chosen.device, chosen.rows
    parts = ", ".join(
        f"{kind.replace('_', ' ')} {gibibytes(size)}"
        for kind, size in plan.facts()["predicted_memory_bytes"].items()
        if size
    )
    yield f"# Made by llamatune init ({SCHEMA_NAME}, for editors: llamatune schema --output {SCHEMA_NAME})."
    yield from _comment(f"For {device.name} with {gibibytes(device.memory_bytes)}, of which 90 % are planned with.")
    yield from _comment(f"Predicted peak of a step: {plan.room()}: {parts}.")
    yield from _comment(f"{rows.told()}.")
    if rows.cut:
        yield from _comment(f"{rows.cut:,} of them are longer than {rows.max_seq_length:,} tokens and are truncated.")
    if prepare is not None:
        yield f"# Before: {prepare}"
    yield f"# Check:  llamatune train {printable(str(name))} --dry-run"
    yield "# Keys that are not here have their defaults; about a key: llamatune explain training.learning_rate"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(printable(text), _WIDTH, break_on_hyphens=False)]


def _entry(written: str, reason: str) -> list[str]:
    """The key with its reason behind it, or above it where the line would be too long."""
    if not reason:
        return [written]
    if len(written) < _COLUMN and _COLUMN + len(reason) + 2 <= _WIDTH + 2:
        return [f"{written:<{_COLUMN}}# {printable(reason)}"]
    return [*(f"  {line}" for line in _comment(reason)), written]


def _scalar(value: Any) -> str:
    """As YAML on one line: a list in brackets, a number as it is usually written."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-") if float(f"{value:.0e}") == value else repr(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()

"""Changes to a run spec as ``section.key=value`` or ``section=null``, and PEFT's spellings of its keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llamatune.errors import SpecError
from llamatune.strict_yaml import parse_yaml

ALIASES: dict[tuple[str, ...], str] = {
    ("lora", "lora_alpha"): "alpha",
    ("lora", "lora_dropout"): "dropout",
    ("lora", "rank_pattern"): "ranks",
    ("lora", "alpha_pattern"): "alphas",
}
"""By section and PEFT's spelling: the key here."""
COMMAND_LINE = "on the command line"
"""Where an override stands, in errors."""
RIVALS = (("training", "num_epochs", "max_steps"), ("training", "warmup_steps", "warmup_ratio"))
"""Two keys of a section that say the same in different ways."""


def overridden_field(assignment: str) -> tuple[str, ...]:
    """The keys of ``section.key=value``, an alias replaced."""
    section, *keys = assignment.partition("=")[0].split(".")
    return section, *(ALIASES.get((section, key), key) if place == 0 else key for place, key in enumerate(keys))


def override(values: dict[str, Any], assignment: str) -> None:
    """Set one field of a spec's plain values, or a whole section, which is None or a mapping."""
    *sections, name = overridden_field(assignment)
    text = assignment.partition("=")[2]
    value = parse_yaml(text, assignment) if text.strip() else None
    is_section = not sections and (value is None or isinstance(value, dict))
    if "=" not in assignment or not (sections or is_section) or not all((*sections, name)):
        todo = "write section.key=value, as in training.seed=1, or section=null to leave a section out"
        raise SpecError(f"{assignment!r} is no override", None, todo)
    for key in sections:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise SpecError(f"{key!r} is not a section", assignment)
    values[name] = value
    if is_section:
        rename_aliases(values, assignment)


def drop_rivals(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """An override takes the place of the key that excludes it, unless that is overridden too."""
    given = {overridden_field(assignment) for assignment in overrides}
    for section, *pair in RIVALS:
        inner = values.get(section)
        if not isinstance(inner, dict):
            continue
        for key, rival in (pair, pair[::-1]):
            if (section, key) in given and inner.get(key) is not None and (section, rival) not in given:
                inner.pop(rival, None)


def caused_by(overrides: Sequence[str], faults: Sequence[str], of_file: Sequence[str]) -> list[str]:
    """Those of a spec's faults that its overrides cause; ``of_file``: those without any override.

    A fault is an override's if its key was overridden; or if it was not there before, and either nothing was that could
    have hidden it, or it names an overridden key.
    """
    given = [overridden_field(assignment) for assignment in overrides]
    paths = {".".join(field) for field in given}
    named = re.compile(r"\b(?:" + "|".join(re.escape(field[-1]) for field in given) + r")\b")

    def is_caused(fault: str) -> bool:
        path = fault.partition(": ")[0]
        if any(path == given or path.startswith(f"{given}.") for given in paths):
            return True
        return fault not in of_file and (not of_file or named.search(fault) is not None)

    return [fault for fault in faults if is_caused(fault)] if given else []


def refuse_twice(overrides: Sequence[str]) -> None:
    """Raise ``SpecError`` if two ``section.key=value`` set the same field, by its name or its alias."""
    fields = [overridden_field(assignment) for assignment in overrides]
    parts = [field[:end] for field in fields for end in range(1, len(field))]  # lora.ranks of lora.ranks.q_proj
    for field, count in Counter([*fields, *set(parts).intersection(fields)]).items():
        if count > 1:
            raise SpecError(f"{'.'.join(field)} is given {count} times", None, "it takes one value, keep one")


def rename_aliases(values: dict[str, Any], where: object) -> None:
    """Replace PEFT's spellings in a spec's plain values."""
    for (section, alias), name in ALIASES.items():
        inner = values.get(section)
        if isinstance(inner, dict) and alias in inner:
            if name in inner:
                raise SpecError(f"{section}.{alias} and {section}.{name} are the same", where, "keep one")
            inner[name] = inner.pop(alias)

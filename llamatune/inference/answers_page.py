"""Markdown page of answers: each prompt, below it its reference, the base's answer and the tuned one, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llamatune import __version__
from llamatune.formats.markdown import code_block, one_line, table
from llamatune.inference.prepared_prompts import HEADINGS


def columns_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The keys of output lines that hold answers, in the order to show them, with their headings."""
    compared = any("base_completion" in line for line in lines)
    headings = {
        "reference": "reference",
        "base_completion": "base",
        "completion": "tuned" if compared else "completion",
    }
    return {key: heading for key, heading in headings.items() if any(key in line for line in lines)}


def sections(lines: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str | None, list[Mapping[str, Any]]]]:
    """The lines of each split under its heading; lines of no split are under none."""
    for split, part in itertools.groupby(lines, key=lambda line: line.get("split")):
        yield (None if split is None else HEADINGS[split]), list(part)


def answers_page(lines: Sequence[Mapping[str, Any]], facts: Mapping[str, object]) -> str:
    """The page of output lines; ``facts`` are said at its head."""
    told = [f"{name}: {one_line(str(value))}" for name, value in facts.items() if value is not None]
    parts = ["# Answers", f"Made by llamatune {__version__}.", "\n".join(f"- {fact}" for fact in told)]
    columns = columns_of(lines)
    for heading, part in sections(lines):
        parts += [] if heading is None else [f"## {heading}"]
        for number, same in enumerate(_by_prompt(part), 1):
            first = same[0]
            parts.append(f"### Row {first['row']}" if "row" in first else f"### Prompt {number}")
            rows = [[str(line.get(key, "")) for key in columns] for line in same]
            parts += [code_block(first["prompt"], "text"), table([*columns.values()], rows)]
    return "\n\n".join(parts) + "\n"


def _by_prompt(lines: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The lines of each prompt, which has several sequences or one."""
    prompts = list[list[Mapping[str, Any]]]()
    for line in lines:
        if line.get("sequence", 1) == 1:
            prompts.append([])
        prompts[-1].append(line)
    return prompts

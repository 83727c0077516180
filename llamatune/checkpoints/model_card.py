"""``README.md`` of a directory that a verb makes: a model card, with the metadata that Hugging Face's Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamatune import __version__
from llamatune.durable_writing import writing
from llamatune.formats.markdown import one_line

CARD = "README.md"
_IN_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)


@dataclass(frozen=True)
class ModelCard:
    """What is said of a product.

    Args:
        base: the base as the user named it.
        library: what opens the product, ``peft`` or ``transformers``; None: neither does.
        facts: rows of a table.
        notes: paragraphs of Markdown.
    """

    title: str
    base: str
    library: str | None
    tags: Sequence[str]
    facts: Mapping[str, object]
    notes: Sequence[str] = ()

    def text(self) -> str:
        metadata: dict[str, Any] = {"base_model": hub_name(self.base), "library_name": self.library}
        metadata |= {"pipeline_tag": "text-generation", "tags": list(self.tags)}
        stated = {name: value for name, value in metadata.items() if value is not None}
        header = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
        rows = [f"| {name} | {one_line(str(value))} |" for name, value in self.facts.items() if value is not None]
        table = "\n".join(("| | |", "|---|---|", *rows))
        made = f"Made by llamatune {__version__}."
        return "\n\n".join((f"---\n{header}---", f"# {one_line(self.title)}", made, table, *self.notes)) + "\n"


def write_card(directory: Path, card: ModelCard) -> None:
    """Not atomic: for staging directories."""
    with writing(directory / CARD) as file:
        file.write(card.text().encode(errors="replace"))


def hub_name(path: str) -> str:
    """``meta-llama/Llama-2-7b-hf`` for a path in the Hub's cache; any other is its own name."""
    found = next((match for part in Path(path).parts if (match := _IN_HUB_CACHE.fullmatch(part))), None)
    return path if found is None else f"{found[1]}/{found[2]}"

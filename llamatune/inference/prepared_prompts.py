"""Prompts of prepared rows: drawn from inside and outside the training set, with the answers that the rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.data.segments import Segment, Segments
from llamatune.errors import DataError, SpecError
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import SplitFile, has_prompts, split_path
from llamatune.seeds import derived_seed
from llamatune.tokenizers.tokenizer import Tokenizer

HEADINGS = {"train": "Inside the training set", "validation": "Outside the training set"}
"""Of the splits, in their order."""


@dataclass(frozen=True)
class PreparedRows:
    """Rows to draw from a prepared directory: how many of each split; None: ``most``, or as many as there are."""

    directory: Path
    counts: Mapping[str, int] | None = None
    most: int = 4


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """What precedes the last answer of a row, that answer as text, the row's split, and its number in the input."""

    segments: Segments
    split: str
    row: int
    reference: str

    def labelled(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """A line of output for the answer."""
        return {"split": self.split, "row": self.row, **answer, "reference": self.reference}


def draw_prompts(rows: PreparedRows, manifest: Manifest, seed: int, tokenizer: Tokenizer) -> list[PreparedPrompt]:
    """The prompts, those of ``train`` first; no row comes twice. ``manifest`` is the directory's.

    Whether a row is drawn, and its place, depends on ``seed``, its split and its number: more rows begin with fewer.

    Raises:
        DataError: the rows have no prompt of their own, or a token that the tokenizer has not.
        SpecError: a split is absent, or has fewer rows than are asked for.
    """
    prompts = list[PreparedPrompt]()
    for split in HEADINGS:
        count = rows.most if rows.counts is None else rows.counts.get(split, 0)
        drawn = draw_split(rows.directory, split, count, manifest, seed, tokenizer)
        if rows.counts is not None and len(drawn) < count:
            what = f"it has {len(drawn) or 'no'} {split} rows with a prompt, and --rows asks for {count}"
            raise SpecError(what, rows.directory, "ask for fewer")
        prompts += drawn
    if not prompts:
        raise DataError("no row has a prompt", rows.directory, "give prompts with --prompt or --prompt-file")
    return prompts


def draw_split(
    directory: Path, split: str, count: int, manifest: Manifest, seed: int, tokenizer: Tokenizer
) -> list[PreparedPrompt]:
    """Up to ``count`` prompts of one split of a prepared directory, of which this is the ``manifest``.

    Raises:
        DataError: as ``draw_prompts``.
    """
    if not has_prompts(manifest.template) or manifest.facts.get("train_on_prompt"):
        what = "its rows have no prompt apart from what is trained"
        raise DataError(what, directory, "give prompts with --prompt or --prompt-file")
    writes_specials = manifest.template is not None and "chat_template" in manifest.template
    path = split_path(directory, split)
    return _draw(path, split, count, seed, tokenizer, writes_specials) if path.exists() else []


def _draw(
    path: Path, split: str, count: int, seed: int, tokenizer: Tokenizer, writes_specials: bool
) -> list[PreparedPrompt]:
    """Up to ``count`` prompts of the rows that have one."""
    file = SplitFile(path)
    starts, numbers = file.row_starts(), file.column("source_rows")
    places = {number: place for place, number in enumerate(numbers)}  # of copies and windows of a row, one
    prompts = list[PreparedPrompt]()
    for number in sorted(places, key=lambda number: derived_seed(seed, "rows", split, number)):
        if len(prompts) == count:
            break
        span = starts[places[number]], starts[places[number] + 1]
        ids, mask = file.column("input_ids", *span).tolist(), file.column("loss_mask", *span).tobytes()
        if not all(0 <= token < tokenizer.vocab_size for token in ids):
            raise DataError(f"row {number} holds a token that the tokenizer has not", path, "prepare the data again")
        end = mask.rfind(1) + 1
        begin = mask.rfind(0, 0, end) + 1
        if begin > len(tokenizer.beginning):
            text = _shown(tokenizer, ids[:begin], writes_specials)
            segments = Segments((Segment(text),), known=tuple(ids[:begin]))
            reference = tokenizer.continuation(ids[:begin], ids[begin:end])
            prompts.append(PreparedPrompt(segments, split, number, reference))
    return prompts


def _shown(tokenizer: Tokenizer, ids: Sequence[int], writes_specials: bool) -> str:
    """The text of a prompt; where a chat template wrote it, with its special tokens."""
    names = {token: name for name, token in tokenizer.special_ids.items()}
    text, begin = "", 0
    for place, token in enumerate([*ids, None]):
        if token is None or token in names:
            text += tokenizer.continuation(ids[:begin], ids[begin:place])
            begin = place + 1
            if token is not None and writes_specials:
                text += names[token]
    return text

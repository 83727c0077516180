"""Encoding of rows: parse, fill the template, tokenise, truncate, and mark the targets of the loss."""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.boundaries import Boundaries, begin_with_prompts
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.column_maps import ColumnMap, parse_map
from llamatune.data.raw_row import RawRow, RowError
from llamatune.data.row_digests import exact_digest, loose_digest, texts_of
from llamatune.data.row_formats import FORMATS, row_of, strip_annotations
from llamatune.data.row_json import Row, decode_row
from llamatune.data.segments import Conversation, Segment, Segments
from llamatune.data.special_texts import SpecialTexts
from llamatune.data.templates import Template
from llamatune.data.windows import Window, split_windows
from llamatune.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llamatune.data.chat_segments import ChatEncoder


@dataclass(frozen=True)
class Recipe:
    """The settings of encoding; sent to each worker process. ``last_only``: a chat trains only its last answer."""

    tokenizer: Tokenizer
    template: Template | ChatTemplate
    format: str
    options: PrepareOptions
    last_only: bool = False

    @functools.cached_property
    def boundaries(self) -> Boundaries:
        return Boundaries(self.tokenizer)

    @functools.cached_property
    def columns(self) -> ColumnMap | None:
        return None if self.options.column_map is None else parse_map(self.options.column_map)

    @functools.cached_property
    def eos(self) -> Segment:
        return Segment(self.tokenizer.piece(self.tokenizer.eos_id), True, self.tokenizer.eos_id)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.special_ids.values())

    @functools.cached_property
    def special_texts(self) -> SpecialTexts:
        return SpecialTexts(self.tokenizer.special_ids)

    @functools.cached_property
    def chats(self) -> ChatEncoder | None:
        """The encoder of a chat template; None: the template is none."""
        if not isinstance(self.template, ChatTemplate):
            return None
        from llamatune.data.chat_segments import ChatEncoder  # importing Jinja takes 40 ms

        return ChatEncoder(self.template, self.tokenizer)

    def segments_of(self, row: Row) -> Conversation:
        """The segments of a row; ``RowError`` if the template has no place for a part of it."""
        answer = row.completion
        if self.format == "gsm8k" and self.options.gsm8k_annotations == "strip":
            answer = strip_annotations(answer)
        if self.chats is not None:
            return self.chats.row(row, answer, last_only=self.last_only, on_prompt=self.options.train_on_prompt)
        assert isinstance(self.template, Template)
        if misfit := self.template.misfit(row):
            raise RowError("template_misfit", misfit)
        if self.options.train_on_prompt and not all(row.trained[:-1]):
            what = "--train-on-prompt trains earlier turns with the prompt, and one of them is not to be trained"
            raise RowError("template_misfit", what)
        prompt, moved = self.template.split_prompt(self.template.prompt_of(row.fields, row.turns))
        completion = Segment(moved + self.template.completion_of(answer), not row.trained or row.trained[-1])
        asked = Segment(prompt, self.options.train_on_prompt)
        return Conversation(Segments((asked, completion, self.eos), moved=moved))


@dataclass
class EncodedBatch:
    """The encoded rows of one batch, and the dropped and refused ones; positions count from 0 within the batch.

    Args:
        ids: the tokens of all kept rows in order, BOS and EOS included.
        positions: of the kept rows; of a split row once for each of its windows.
        lengths: tokens of each kept row.
        targets: (first, last + 1) of each kept row's spans of target tokens (loss mask 1), one after the other.
        span_counts: of each kept row, the number of its spans.
        keys: a digest of each kept row's content: equal rows have equal keys.
        loose_keys: the same without regard to white space and case.
        full_lengths: (position, tokens before truncation) of every row that was encoded.
        truncated: number of truncated rows; ``truncated_tokens`` is how many tokens they lost.
        split_rows: number of rows that were split; ``split_windows`` is how many rows they became, ``repeated_tokens``
            how many of their tokens are in one window more, as context.
        special_texts: (position, text) of kept rows that hold the text of a special token.
        moved_spaces: kept rows of which white space at the prompt's end is encoded with the completion.
        forced_boundaries: kept rows that would have other tokens at a prompt's end if they were encoded as a whole.
        prompts_not_prefix: kept rows whose tokens do not begin with those of a prompt of theirs alone.
        only_last: kept chats of which the template lets only the last answer be trained, though earlier ones should be.
        dropped: (position, reason).
        refused: (position, kind, message).
        ignored_keys: number of rows with each key that is not read or that the template does not use.
        adjusted: number of rows with each kind of what was read though it was not in the usual form.
    """

    ids: array[int] = field(default_factory=lambda: array("i"))
    positions: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    targets: array[int] = field(default_factory=lambda: array("i"))
    span_counts: array[int] = field(default_factory=lambda: array("i"))
    keys: array[int] = field(default_factory=lambda: array("Q"))
    loose_keys: array[int] = field(default_factory=lambda: array("Q"))
    full_lengths: list[tuple[int, int]] = field(default_factory=list)
    truncated: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    split_windows: int = 0
    repeated_tokens: int = 0
    special_texts: list[tuple[int, str]] = field(default_factory=list)
    moved_spaces: int = 0
    forced_boundaries: int = 0
    prompts_not_prefix: int = 0
    only_last: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    ignored_keys: Counter[str] = field(default_factory=Counter)
    adjusted: Counter[str] = field(default_factory=Counter)


def encode_batch(recipe: Recipe, rows: Sequence[RawRow]) -> EncodedBatch:
    """Encode ``rows``; an unusable row is recorded in ``refused``, never raised.

    ``LlamatuneError`` for a chat template that cannot be rendered within its limits.
    """
    batch = EncodedBatch()
    for position, raw in enumerate(rows):
        try:
            row = row_of(decode_row(raw), FORMATS[recipe.format], recipe.columns)
            conversation = recipe.segments_of(row)
        except RowError as fault:
            batch.refused.append((position, fault.kind, fault.message))
            continue
        unused = recipe.template.unused_fields(row) if isinstance(recipe.template, Template) else ()
        batch.ignored_keys.update(row.ignored_keys + unused)
        batch.adjusted.update(row.adjusted)
        _encode_row(batch, recipe, position, row, conversation)
    return batch


def _encode_row(batch: EncodedBatch, recipe: Recipe, position: int, row: Row, conversation: Conversation) -> None:
    tokenizer, options = recipe.tokenizer, recipe.options
    segments = conversation.segments
    ids, targets = segments.encode(tokenizer)
    batch.full_lengths.append((position, len(ids)))
    excess = len(ids) - options.max_seq_length
    split = excess > 0 and options.overlong == "split"
    if excess > 0 and options.overlong not in ("truncate", "split"):
        batch.dropped.append((position, "overlong"))
        return
    # Truncation cuts off the EOS too: the completion does not end here.
    end = len(ids) if split else min(len(ids), options.max_seq_length)
    if excess > 0:
        targets = [(first, min(last, end)) for first, last in targets if first < end]
    if targets and targets[0][0] == 0:  # nothing precedes the first token, not even a BOS if the tokenizer has none
        targets = [(max(first, 1), last) for first, last in targets if last > 1]
    # If the tokenizer normalised the whole completion away, EOS alone would train an empty answer.
    special = recipe.special_ids
    begins_special = not targets or ids[targets[0][0]] in special  # of most rows it settles the matter
    if begins_special and all(ids[at] in special for first, last in targets for at in range(first, last)):
        batch.dropped.append((position, "no_target_tokens"))
        return
    if end < len(ids):
        batch.truncated += 1
        batch.truncated_tokens += excess
    is_prompted = conversation.is_prompted and (tokenizer.splits or begin_with_prompts(segments, ids, tokenizer))
    batch.prompts_not_prefix += not is_prompted
    batch.moved_spaces += bool(segments.moved)
    batch.forced_boundaries += tokenizer.splits and recipe.boundaries.are_forced(segments)
    batch.only_last += conversation.only_last
    if not split:
        _keep(batch, recipe, position, row, [Window(ids[:end] if excess > 0 else ids, targets, 0)])
        return
    windows = split_windows(ids, targets, len(tokenizer.beginning), options.max_seq_length, options.stride)
    batch.split_rows += 1
    batch.split_windows += len(windows)
    batch.repeated_tokens += sum(window.repeated for window in windows)
    _keep(batch, recipe, position, row, windows)


def _keep(batch: EncodedBatch, recipe: Recipe, position: int, row: Row, windows: Sequence[Window]) -> None:
    """Add a row, in one window or several."""
    texts, key = texts_of(row), exact_digest(row)
    loose_key = loose_digest(texts)
    if special := recipe.special_texts.first_in(texts):
        batch.special_texts.append((position, special))
    for ids, targets, _ in windows:
        batch.ids.fromlist(ids)  # faster than extend, which takes any iterable
        batch.positions.append(position)
        batch.lengths.append(len(ids))
        batch.span_counts.append(len(targets))
        for first, last in targets:
            batch.targets.append(first)
            batch.targets.append(last)
        batch.keys.append(key)
        batch.loose_keys.append(loose_key)

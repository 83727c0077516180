"""Encoding of rows: parse, fill the template, tokenise, truncate, and mark where the targets of the loss begin."""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prefix_check import PromptCheck
from llamatune.data.row_files import RawRow, RowError
from llamatune.data.row_formats import FORMATS, row_of, strip_annotations
from llamatune.data.row_json import Row, decode_row
from llamatune.data.templates import Template
from llamatune.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """The settings of encoding; sent to each worker process."""

    tokenizer: Tokenizer
    template: Template
    format: str
    options: PrepareOptions

    @functools.cached_property  # scanning a vocabulary takes longer than encoding a batch of rows
    def prompt_check(self) -> PromptCheck:
        return PromptCheck(self.tokenizer)


@dataclass
class EncodedBatch:
    """The encoded rows of one batch, and the dropped and refused ones; positions count from 0 within the batch.

    Args:
        ids: the tokens of all kept rows in order, BOS and EOS included.
        positions: of the kept rows.
        lengths: tokens of each kept row.
        first_targets: index of each kept row's first target token (loss mask 1); all later tokens are targets too.
        keys: a digest of each kept row's content: equal rows have equal keys.
        full_lengths: (position, tokens before truncation) of every row that was encoded.
        truncated: number of truncated rows; ``truncated_tokens`` is how many tokens they lost.
        prompts_not_prefix: kept rows whose tokens do not begin with those of the prompt alone.
        dropped: (position, reason).
        refused: (position, kind, message).
        ignored_keys: number of rows with each key that is not read or that the template does not use.
    """

    ids: array[int] = field(default_factory=lambda: array("i"))
    positions: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    first_targets: array[int] = field(default_factory=lambda: array("i"))
    keys: array[int] = field(default_factory=lambda: array("Q"))
    full_lengths: list[tuple[int, int]] = field(default_factory=list)
    truncated: int = 0
    truncated_tokens: int = 0
    prompts_not_prefix: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    ignored_keys: Counter[str] = field(default_factory=Counter)


def encode_batch(recipe: Recipe, rows: Sequence[RawRow]) -> EncodedBatch:
    """Encode ``rows``; an unusable row is recorded in ``refused``, never raised."""
    batch = EncodedBatch()
    for position, raw in enumerate(rows):
        try:
            row = row_of(decode_row(raw), FORMATS[recipe.format])
            if misfit := recipe.template.misfit(row):
                raise RowError("template_misfit", misfit)
        except RowError as fault:
            batch.refused.append((position, fault.kind, fault.message))
            continue
        batch.ignored_keys.update(row.ignored_keys + recipe.template.unused_fields(row))
        _encode_row(batch, recipe, position, row)
    return batch


def _encode_row(batch: EncodedBatch, recipe: Recipe, position: int, row: Row) -> None:
    tokenizer, options, answer = recipe.tokenizer, recipe.options, row.completion
    if recipe.format == "gsm8k" and options.gsm8k_annotations == "strip":
        answer = strip_annotations(answer)
    prompt, completion = recipe.template.prompt_of(row.fields, row.turns), recipe.template.completion_of(answer)
    ids, first = tokenizer.encode_pair(prompt, completion)
    is_prefix = recipe.prompt_check.is_prefix(prompt, completion, ids)
    first = max(first, 1)  # nothing precedes the first token, not even a BOS if the tokenizer has none
    has_text = first < len(ids)
    ids.append(tokenizer.eos_id)
    excess = len(ids) - options.max_seq_length
    batch.full_lengths.append((position, len(ids)))
    if options.train_on_prompt:
        first = 1
    if excess > 0:
        if options.overlong != "truncate":
            batch.dropped.append((position, "overlong"))
            return
        del ids[options.max_seq_length :]  # the EOS too: the completion does not end here
    # If the tokenizer normalised the whole completion away, EOS alone would train an empty answer.
    if first >= len(ids) or not has_text:
        batch.dropped.append((position, "no_target_tokens"))
        return
    if excess > 0:
        batch.truncated += 1
        batch.truncated_tokens += excess
    batch.prompts_not_prefix += not is_prefix
    batch.ids.extend(ids)
    batch.positions.append(position)
    batch.lengths.append(len(ids))
    batch.first_targets.append(first)
    content = repr((sorted(row.fields.items()), row.turns, row.completion)).encode()
    batch.keys.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))

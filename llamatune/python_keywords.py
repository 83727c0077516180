"""Keyword arguments of the Python API: the options of the verbs, with paths as text too. A test holds them equal.

Options that only print have none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

AnyPath = str | os.PathLike[str]


class PrepareKeywords(TypedDict, total=False):
    """Of ``PrepareOptions``."""

    format: str
    column_map: str | None
    template: str | None
    max_seq_length: int
    overlong: Literal["truncate", "drop", "error", "split"]
    stride: int
    validation_fraction: float | None
    validation: Sequence[AnyPath]
    limit: int | None
    seed: int
    train_on: Literal["all-assistant", "last-assistant"] | None
    train_on_prompt: bool
    skip_bad_rows: int
    gsm8k_annotations: Literal["keep", "strip"]
    overwrite: bool


class ModelKeywords(TypedDict, total=False):
    """Of ``ModelSource``: what ``generate`` and ``evaluate`` open."""

    variant: str | None
    compare: bool
    force_base: bool
    dtype: Literal["same", "float32", "bfloat16", "float16", "nf4", "float8", "int8"]
    device: str
    placement: Literal["device", "host", "shard"]
    weights: tuple[float, ...] | None


class GenerateKeywords(ModelKeywords, total=False):
    """Of ``GenerateOptions``."""

    prompt_file: AnyPath | None
    format: str
    column_map: str | None
    template: str | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    num_beams: int
    length_penalty: float
    num_return_sequences: int
    from_data: AnyPath | None
    rows: Mapping[str, int] | None
    stop: Sequence[str]
    output: AnyPath | None
    markdown: AnyPath | None
    overwrite: bool
    lookup: Literal["auto", "on", "off"]
    merge: Literal["auto", "on", "off"]


class EvaluateKeywords(ModelKeywords, total=False):
    """Of ``EvaluateOptions``."""

    task: str | None
    split: Literal["train", "validation", "all"] | None
    per_row: AnyPath | None
    template: str | None
    shots: int | None
    shots_data: AnyPath | None
    seed: int | None
    max_new_tokens: int | None
    output: AnyPath | None
    overwrite: bool
    limit: int | None
    batch_size: int | None


class MergeKeywords(TypedDict, total=False):
    """Of ``MergeOptions``."""

    variant: str | None
    format: Literal["same", "hf", "meta"]
    dtype: Literal["same", "float32", "bfloat16", "float16"]
    force_base: bool
    overwrite: bool
    weights: tuple[float, ...] | None
    template: str | None
    onto_quantized: bool
    probe: AnyPath | None
    least_kept: float | None
    device: str | None

"""Schemas of ``llamatune.json``: a product's files and inputs, and its facts by the kind of product. No torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from llamatune.formats.file_schema import LARGEST_NUMBER, Count, FileEntry, FileSchema, Measure, Name, Positive, Sha256

_LARGEST_INTEGER = 1 << 64
"""Of the inputs, which hold seeds."""
_TEXTS = ("name", "prompt", "chat_template")
Counts = dict[str, Count]
Share = Annotated[float, Field(ge=0, le=1.0000001)]
"""Of energies, a sum may be rounded up."""
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_Finite = Annotated[float, Field(gt=-LARGEST_NUMBER, lt=LARGEST_NUMBER)]


def _bounded(value: Any) -> Any:
    """``value``, if every number in it is finite and of fewer than twenty digits."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, float) and not math.isfinite(part):
            raise ValueError("it should hold finite numbers")
        elif isinstance(part, int) and abs(part) >= _LARGEST_INTEGER:
            raise ValueError("it should hold whole numbers below 2^64")
    return value


def _with_texts(template: dict[str, Any]) -> dict[str, Any]:
    wrong = next((name for name in _TEXTS if not isinstance(template.get(name), str | None)), None)
    if wrong is not None:
        raise ValueError(f"its {wrong} should be a text")
    return template


Bounded = Annotated[dict[str, Any], AfterValidator(_bounded)]
"""An object of any keys whose numbers are finite and not endless."""
StoredTemplate = Annotated[Bounded, AfterValidator(_with_texts)]


class ProductManifest(FileSchema):
    """The whole file. ``facts`` are read by the schema of their kind."""

    kind: Name
    version: Literal[1] = Field(alias="schema")
    inputs: Bounded
    facts: Bounded
    files: Annotated[dict[str, FileEntry], Field(min_length=1)]
    sha256: Sha256 | None = None
    """Of the file itself, as ``own_digest`` has it; earlier versions wrote none."""


class Facts(FileSchema, extra="allow"):
    """What any product may tell; of kinds that are not known here, other facts are let be."""

    template: StoredTemplate | None = None
    base_fingerprint: Name | None = None
    base_path: Name | None = None
    max_position_embeddings: Positive | None = None
    adapters: list[Name] | None = None


class _TokenizerFacts(FileSchema):
    fingerprint: Name | None = None
    vocab_size: Positive | None = None
    bos_id: _TokenId | None = None
    eos_id: _TokenId | None = None


class SplitFacts(FileSchema):
    """Of one split, as written."""

    rows: Count
    tokens: Count
    target_tokens: Count
    longest_row_tokens: Count | None = None


class _RowPlace(FileSchema):
    file: str
    line: Count | None = None
    row: Count


class _LongRow(_RowPlace):
    tokens: Count


class _SpecialText(_RowPlace):
    text: str


class _RowFile(FileSchema):
    file: str
    format: Name
    template: Name
    weight: Measure | None
    rows_in: Count
    kept: Count
    dropped: Count
    refused: Count
    train_rows: Count
    validation_rows: Count


class PreparedFacts(FileSchema):
    """Of prepared data; what earlier versions did not count is missing."""

    format: Name | None = None
    template: StoredTemplate | None = None
    end_of_turn_id: _TokenId | None = None
    tokenizer: _TokenizerFacts | None = None
    max_seq_length: Positive | None = None
    overlong: Name | None = None
    train_on_prompt: bool | None = None
    train_on: Name | None = None
    row_files: list[str] | None = None
    validation_files: list[str] | None = None
    rows_in: Count | None = None
    kept: Count | None = None
    truncated: Count | None = None
    truncated_tokens: Count | None = None
    split_rows: Count | None = None
    split_windows: Count | None = None
    repeated_tokens: Count | None = None
    moved_spaces: Count | None = None
    forced_boundaries: Count | None = None
    prompts_not_prefix: Count | None = None
    only_last: Count | None = None
    dropped: Count | None = None
    dropped_reasons: Counts | None = None
    refused: Count | None = None
    refused_reasons: Counts | None = None
    duplicates: Count | None = None
    loose_duplicates: Count | None = None
    validation_rows_in_train: Count | None = None
    validation_rows_near_train: Count | None = None
    special_texts: Counts | None = None
    first_special_text: _SpecialText | None = None
    ignored_keys: Counts | None = None
    adjusted: Counts | None = None
    longest_rows: list[_LongRow] | None = None
    files: list[_RowFile] | None = None
    train_rows: Count | None = None
    validation_rows: Count | None = None
    tokens: Count | None = None
    target_tokens: Count | None = None
    splits: dict[Literal["train", "validation"], SplitFacts] | None = None


class _Matrix(FileSchema):
    name: Name
    norm: Measure
    method: Literal["full", "randomised"]
    energy: Annotated[dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], Share], Field(min_length=1)]


class _Extraction(FileSchema):
    output: str
    r: Positive
    target_modules: list[Name]
    retained_energy: Share
    matrices: list[_Matrix]
    left_out: dict[str, Annotated[list[Measure], Field(min_length=2, max_length=2)]] = Field(default_factory=dict)
    already_done: bool = False


class AdapterFacts(Facts, extra="forbid"):
    """Of an adapter; ``report`` is that of ``extract-lora``."""

    base_dtype: Name | None = None
    report: _Extraction | None = None


class _Merge(FileSchema):
    output: str
    format: Name
    dtype: Name
    tensors: Count
    merged_tensors: Count
    max_abs_error: Measure
    vanished_fraction: Share
    bytes: Count
    already_done: bool = False
    probe_rows: Count | None = None
    probe_base_loss: Measure | None = None
    probe_tuned_loss: Measure | None = None
    probe_merged_loss: Measure | None = None
    probe_gain_kept: _Finite | None = None


class MergedFacts(Facts, extra="forbid"):
    """Of a merged model."""

    base_forced: bool | None = None
    report: _Merge | None = None


class _Conversion(FileSchema):
    output: str
    format: Name
    dtype: Name
    tensors: Count
    bytes: Count
    sha256: Sha256 | None = None
    already_done: bool = False


class ConvertedFacts(Facts, extra="forbid"):
    """Of a converted model, with what a merge said of it before."""

    base_forced: bool | None = None
    report: _Conversion | None = None


class CacheFacts(FileSchema):
    """Of a cache of quantised weights: none."""


FACTS: dict[str, type[FileSchema]] = {
    "prepared": PreparedFacts,
    "adapter": AdapterFacts,
    "merged": MergedFacts,
    "converted": ConvertedFacts,
    **{f"{dtype}-weights": CacheFacts for dtype in ("nf4", "float8", "int8")},
}
"""The schema of the facts of each kind."""

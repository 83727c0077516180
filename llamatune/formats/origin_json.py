"""``origin.json``, what a run was begun on: digests of its inputs, changes of its spec, its passes and its GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from llamatune.errors import SpecError
from llamatune.events import RateSearch
from llamatune.formats.file_schema import LARGEST_FILE, FileSchema, JsonValue, Name, parse_values, read_schema
from llamatune.formats.rate_search import FoundRate
from llamatune.formats.state_json import Gpu
from llamatune.strict_json import dump_json

MOST_LANES = 1 << 20
_Number = Annotated[int, Field(ge=1, lt=1 << 31)]
Digest = Annotated[str, Field(min_length=1, max_length=200)]


class SpecChange(FileSchema):
    """A field of the spec that was changed between two starts."""

    field: Name
    old: JsonValue
    new: JsonValue


class Passes(FileSchema):
    """As ``training.passes.PassRule`` has them."""

    tokens: _Number | None
    at_least: _Number
    lanes: _Number | None

    @model_validator(mode="after")
    def _of_two(self) -> Self:
        lanes = self.lanes or 1
        if lanes > MOST_LANES or lanes.bit_count() != 1:
            raise ValueError(f"lanes should be a power of two, at most {MOST_LANES:,}")
        return self


class Origin(FileSchema):
    """The whole file. ``train`` and ``validation`` are lists where there are several directories.

    ``passes`` is missing in runs of versions that had none. ``learning_rate_search`` is there where the
    spec's learning rate was ``auto``.
    """

    base: Digest
    train: Digest | list[Digest]
    validation: Digest | list[Digest] | None
    spec_changes: list[SpecChange] = Field(default_factory=list)
    passes: Passes | None = None
    gpu: Gpu | None = None
    learning_rate_search: FoundRate | None = None

    @field_validator("passes", mode="before")
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("it should not be null")
        return value

    @property
    def inputs(self) -> dict[str, Any]:
        """The digests, by name."""
        return {name: getattr(self, name) for name in ("base", "train", "validation")}

    @property
    def search(self) -> RateSearch | None:
        """The search for the learning rate, if there was one."""
        found = self.learning_rate_search
        return None if found is None else RateSearch(**found.model_dump())

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The changes of the spec as they are written."""
        return [change.model_dump() for change in self.spec_changes]


def read_origin(path: Path) -> Origin:
    """Read the file.

    Raises:
        CheckpointError: a value does not fit.
    """
    return read_schema(Origin, path)


def dump_origin(path: Path, values: Mapping[str, Any]) -> bytes:
    """The content of the file that is to stand at ``path``; ``SpecError`` where it would be too long to be read."""
    content = dump_json(parse_values(Origin, values, path).model_dump(exclude_unset=True))
    if len(content) > LARGEST_FILE:
        what = f"the spec was changed so often that {len(content):,} bytes would be recorded"
        raise SpecError(what, path, "choose another training.output_dir")
    return content

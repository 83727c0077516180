"""The search for a learning rate as ``origin.json`` and ``metrics.jsonl`` keep it: the rate, and its evidence."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from llamatune.formats.file_schema import Count, FileSchema, Measure, Name, Rate, require

MOST_TRIALS = 64


class FoundRate(FileSchema):
    """As ``events.RateSearch`` has it; a loss is null where the trial diverged."""

    learning_rate: Rate
    method: Name
    rates: Annotated[list[Rate], Field(min_length=1, max_length=MOST_TRIALS)]
    losses: Annotated[list[Measure | None], Field(min_length=1, max_length=MOST_TRIALS)]
    start_loss: Measure
    updates: Count
    micro_batches: Count

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        require({"losses should be as many as rates": len(self.losses) == len(self.rates)})
        return self

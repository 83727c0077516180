"""Options of ``generate``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.inference import ModelSource, PromptOptions, Sampling
from llamatune.command_options.option import option
from llamatune.errors import SpecError
from llamatune.shapes.dtypes import QUANTIZED_DTYPES

Lookup = Literal["auto", "on", "off"]
Merge = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling, PromptOptions, ModelSource):
    """A model, prompts and how to sample. The options of the last base are listed first, as in every dataclass."""

    stop: Sequence[str] = option("End a completion before this text; may be repeated.", (), metavar="TEXT")
    output: Path | None = option(
        "Also write the results to this JSONL file; - is stdout. With --prompt-file the same command continues it.",
        None,
        writes="answers",
    )
    overwrite: bool = option("Replace what stands at --output.", False)
    lookup: Lookup = option(
        "Draft tokens from the text so far where it is faster: auto, on (in 16 bits too) or off.",
        "auto",
        last=True,
    )

    merge: Merge = option(
        "Compute with the adapter merged into the weights, in memory alone: auto (on a GPU), on or off.",
        "auto",
        last=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_merge()
        if "" in self.stop:
            raise SpecError("an empty text", "--stop", "give a text that ends a completion")
        if self.stop and self.num_beams > 1:
            raise SpecError("--stop and --num-beams exclude each other", None, "leave one of them out")

    def _check_merge(self) -> None:
        if self.merge != "on":
            return
        if not self.adapters:
            raise SpecError("--merge on needs an adapter", None, "give one with --adapter")
        others = (("--compare", self.compare), (f"--placement {self.placement}", self.placement != "device"))
        for flag, is_given in (*others, (f"--dtype {self.dtype}", self.dtype in QUANTIZED_DTYPES)):
            if is_given:
                raise SpecError(f"--merge on and {flag} exclude each other", None, "leave one of them out")

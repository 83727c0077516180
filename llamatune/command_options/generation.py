"""Options of ``generate``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.inference import ModelSource, PromptOptions, Sampling
from llamatune.command_options.option import option
from llamatune.errors import SpecError
from llamatune.shapes.dtypes import QUANTIZED_DTYPES

Lookup = Literal["auto", "on", "off"]
Merge = Literal["auto", "on", "off"]


_PART = re.compile(r"(train|validation):([1-9][0-9]{0,6})", re.ASCII)


def parse_rows(text: str, flag: str) -> dict[str, int]:
    """``train:4,validation:4`` as numbers of rows by split."""
    parts = [_PART.fullmatch(part) for part in text.split(",")]
    counts = {part[1]: int(part[2]) for part in parts if part is not None}
    if len(counts) < len(parts):
        todo = "give each split once, with its number of rows, such as train:4,validation:4"
        raise SpecError(f"{flag} is {text[:80]!r}", None, todo)
    return counts


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling, PromptOptions, ModelSource):
    """A model, prompts and how to sample. The options of the last base are listed first, as in every dataclass."""

    from_data: Path | None = option("A prepared directory that rows are drawn from, by --seed.", None, metavar="DIR")
    rows: Mapping[str, int] | None = option(
        "Of --from-data, such as train:4,validation:4.",
        None,
        parse=parse_rows,
        shown_default="4 of each split",
        metavar="SPLIT:NUMBER,...",
    )
    stop: Sequence[str] = option("End a completion before this text; may be repeated.", (), metavar="TEXT")
    output: Path | None = option(
        "Also write the results to this JSONL file; - is stdout. With --prompt-file or --from-data the same command "
        "continues it.",
        None,
        writes="answers",
    )
    markdown: Path | None = option("Also write them to this Markdown file, answers side by side.", None, writes="file")
    overwrite: bool = option("Replace what stands at --output and --markdown.", False)
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
        if self.rows is not None and self.from_data is None:
            raise SpecError("it needs --from-data", "--rows")
        others = {"--prompt": self.prompt, "--prompt-file": self.prompt_file, "--template": self.template}
        for flag, given in others.items():
            if self.from_data is not None and given:
                raise SpecError(f"--from-data and {flag} exclude each other", None, "leave one of them out")
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

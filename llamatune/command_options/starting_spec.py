"""Options of ``init``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.option import Options, option
from llamatune.units import parse_size

MEASURED_ROWS = 10_000


@dataclass(frozen=True)
class InitOptions(Options):
    """What a spec is written for. Without ``gpu`` the machine's own is taken, and without one its CPU."""

    model: Path = option("The base model, Hugging Face's or Meta's; weights are not read.", metavar="DIR")
    data: Path = option(
        "A directory of prepare-data, or a file of rows, whose lengths are then measured.", metavar="DIR|FILE"
    )
    overrides: Sequence[str] = option(
        "Settings that are yours to choose, as lora.r=8.", (), argument=True, metavar="KEY=VALUE ..."
    )
    memory_bytes: int | None = option(
        "Of the device, such as 24GiB; 90 % of it is used.",
        None,
        flag="--memory",
        metavar="SIZE",
        shown_default="the device's",
        parse=parse_size,
    )
    gpu: str | None = option(
        "v100, t4, a100, a100-80gb, rtx-4090, h100 and others; a compute capability, as 8.6; or cpu.",
        None,
        metavar="NAME",
        shown_default="this machine's",
    )
    output: Path | None = option("The spec to write.", None, shown_default="stdout", writes="file")
    overwrite: bool = option("Replace what stands at --output.", False)

"""Options of ``slurm``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from llamatune.errors import SpecError
from llamatune.options.option import Option, Options

_TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}"
_NAMES = r"[\w.,@+-]+"


@dataclass(frozen=True)
class SlurmOptions(Options):
    """The job that a batch script asks Slurm for."""

    specs: Annotated[
        Sequence[Path], Option("The run spec; with --array, one for each task.", argument=True, metavar="SPEC...")
    ]
    nodes: Annotated[int, Option("Nodes of the job.", metavar="N", at_least=1, at_most=100_000)] = 1
    gpus_per_node: Annotated[int, Option("GPUs of a node; one process each.", metavar="G", at_least=0, at_most=64)] = 1
    cpus_per_task: Annotated[
        int | None, Option("CPU cores of a process.", metavar="N", at_least=1, at_most=4096, shown_default="Slurm's own")
    ] = None
    time: Annotated[str, Option("The time limit, as Slurm writes it: 90, 4:00:00, 1-12.")] = "04:00:00"
    partition: Annotated[str | None, Option("The partition.", metavar="NAME", shown_default="Slurm's own")] = None
    array: Annotated[bool, Option("A job array: each SPEC is a task of its own.")] = False
    output: Annotated[Path | None, Option("The script to write.", shown_default="stdout")] = None
    overwrite: Annotated[bool, Option("Replace what stands at --output.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) > 1 and not self.array:
            raise SpecError(f"{len(self.specs)} specs", None, "give one, or --array for a task each")
        if not re.fullmatch(_TIME, self.time):
            raise SpecError(f"--time is {self.time!r}", None, "write minutes, H:MM:SS, D-HH or D-HH:MM:SS")
        if self.partition is not None and not re.fullmatch(_NAMES, self.partition):
            raise SpecError(f"--partition is {self.partition!r}", None, "give a name, or several with commas")

"""Options of ``slurm``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError
from llamatune.units import slurm_seconds

_NAMES = r"[A-Za-z0-9_.,@+-]+"


@dataclass(frozen=True)
class SlurmOptions(Options):
    """The job that a batch script asks Slurm for."""

    specs: Sequence[Path] = option(
        "The run spec; with --array, one for each task.", argument=True, metavar="SPEC.yaml..."
    )
    nodes: int = option("Nodes of the job.", 1, metavar="N", at_least=1, at_most=100_000)
    gpus_per_node: int | None = option(
        "GPUs of a node, one process each. 0: one process a node.",
        None,
        at_least=0,
        at_most=64,
        shown_default="1, or 0 where each spec says device: cpu",
    )
    cpus_per_task: int | None = option(
        "CPU cores of a process.", None, metavar="N", at_least=1, at_most=4096, shown_default="Slurm's own"
    )
    time: str = option(
        "The time limit, as Slurm writes it: 90 (minutes), 4:00:00, 1-12 (days-hours).", "04:00:00", metavar="TIME"
    )
    partition: str | None = option("The partition.", None, metavar="NAME", shown_default="Slurm's own")
    array: bool = option("A job array: each SPEC is a task of its own.", False)
    output: Path | None = option("The script to write.", None, shown_default="stdout", writes="file")
    overwrite: bool = option("Replace what stands at --output.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) > 1 and not self.array:
            raise SpecError(f"{len(self.specs)} specs", None, "give one, or --array for a task each")
        if not slurm_seconds(self.time):
            raise SpecError(f"--time is {self.time!r}", None, "write minutes, H:MM:SS, D-HH or D-HH:MM:SS")
        if self.partition is not None and not re.fullmatch(_NAMES, self.partition):
            raise SpecError(f"--partition is {self.partition!r}", None, "give a name, or several with commas")

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        return slurm_seconds(self.time) or 0

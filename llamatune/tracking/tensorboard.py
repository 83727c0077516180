"""The TensorBoard tracker: writes event files for ``tensorboard --logdir RUN/tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class TensorBoardTracker:
    """Event files in ``tensorboard/`` of the run directory; each process writes all steps from the first on.

    So steps that an earlier process did not flush are not lost. ``purge_step`` makes TensorBoard discard what it read
    from earlier files. The newest of these is kept: a TensorBoard that has it open continues from it.
    """

    next_step = 0

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = run / "tensorboard"
        for old in sorted(directory.glob("events.out.tfevents.*"))[:-1]:
            old.unlink()
        self._writer = SummaryWriter(str(directory), purge_step=0, flush_secs=10)

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def close(self, exit_code: int) -> None:
        self._writer.close()

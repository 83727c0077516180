"""Every test of the command line begins without a launcher's variables."""

import os

import pytest

_LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "MASTER_")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(_LAUNCHERS) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)

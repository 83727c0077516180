"""What the runs of the fault sweeps need: prepared rows, specs, and a warm parent that forks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import spec_values
from warm import Warm


@pytest.fixture(scope="session")
def few_rows(prepared: Callable[..., Path], tiny_rows: Path) -> Path:
    """16 rows to train on and 3 to validate on, in micro-batches of 2 and windows of 6: the last window is partial."""
    return prepared(rows=tiny_rows, limit=23, validation_fraction=0.2, seed=3)


@pytest.fixture(scope="session")
def job_file(
    tmp_path_factory: pytest.TempPathFactory, small_base: Path, few_rows: Path
) -> Callable[..., tuple[str, ...]]:
    """The command line that trains with some changes, apart from where."""

    def write(**changes: Any) -> tuple[str, ...]:
        settings = {
            "training__micro_batch_size": 2, "training__gradient_accumulation_steps": 3, "training__max_steps": 4,
            "training__save_every_steps": 1, "evaluation__every_steps": 2, **changes,
        }  # fmt: skip
        path = tmp_path_factory.mktemp("job") / "run.yaml"
        path.write_text(yaml.safe_dump(spec_values(small_base, few_rows, Path("nowhere"), **settings)))
        return "train", str(path), "--json"

    return write


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, job_file: Callable[..., tuple[str, ...]]) -> Iterator[Warm]:
    """The parent, which has trained once itself."""
    scratch = tmp_path_factory.mktemp("warm")
    parent = Warm([[*job_file(), f"training.output_dir={scratch / 'run'}"]], scratch)
    yield parent
    parent.close()

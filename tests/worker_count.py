"""Number of test processes of ``pytest -n auto``: one more than there are cores, since tests of ranks mostly wait."""

from __future__ import annotations

import os


def pytest_xdist_auto_num_workers() -> int:
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

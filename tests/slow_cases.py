"""Cases of a parametrised test that run in the long sweeps alone (`make test-faults`)."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: object) -> Any:
    """The case, marked `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)

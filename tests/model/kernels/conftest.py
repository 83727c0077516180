"""Triton's interpreter, which runs kernels on the CPU, for the tests of this folder."""

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

from llamatune.model.kernels.choice import running_kernels


@pytest.fixture(autouse=True)
def interpreted_kernels() -> Iterator[None]:
    """Kernels in place of plain functions on the CPU."""
    with running_kernels("cpu"):
        yield

"""The same weights in either format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session", params=["hf", "meta"])
def either_format(request: pytest.FixtureRequest, meta_copy: Callable[..., Path]) -> Callable[[Path], Path]:
    """The same weights as a Hugging Face directory and as a Meta directory."""
    return (lambda base: base) if request.param == "hf" else meta_copy

"""A fixture that runs a test twice: as if the processor had AMX, and as if it had not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamatune import processor


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether ``has_amx`` says so; torch and oneDNN compute as the real processor can."""
    flags = "avx512_bf16 amx_bf16" if request.param else "avx512_bf16"
    monkeypatch.setattr(processor, "_values", lambda name: iter([flags] if name == "flags" else []))
    processor.has_amx.cache_clear()
    yield request.param
    processor.has_amx.cache_clear()

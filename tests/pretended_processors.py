"""A fixture that runs a test twice: as if the processor had AMX, and as if it had neither that nor VNNI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamatune import processor


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether ``has_amx`` says so; torch and oneDNN compute as the real processor can."""
    flags = "avx512bw avx512_bf16 amx_bf16" if request.param else "avx512bw avx512_bf16"

    def clear() -> None:
        processor.has_amx.cache_clear()
        processor.has_avx512.cache_clear()
        processor.has_vnni.cache_clear()

    monkeypatch.setattr(processor, "_values", lambda name: iter([flags] if name == "flags" else []))
    clear()
    yield request.param
    clear()

"""For which GPUs a build of torch has kernels, by the names of its architectures."""

from __future__ import annotations

import pytest

from llamatune.shapes.torch_builds import has_kernels

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), CU130, False),
        ((7, 0), CU126, True),
        ((7, 2), CU126, True),
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),  # machine code of 8.6
        ((8, 0), ["sm_86"], False),
        ((10, 3), CU130, True),
        ((12, 1), CU126, False),
        ((12, 0), [*CU126, "compute_90"], True),
        ((7, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((11, 0), ["compute_100f"], False),
        ((12, 0), ["compute_90a"], False),
        ((9, 0), [], True),  # nothing is known
        ((9, 0), ["gfx90a"], True),  # ROCm
    ],
)
def test_a_build_runs_where_its_machine_code_or_its_ptx_does(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert has_kernels(capability, architectures) is expected

"""What to train with on each kind of GPU, and what is slower or refused there."""

from __future__ import annotations

import re

import pytest

from llamatune.memory.plan import heaviest_rows, plan_memory
from llamatune.shapes import torch_builds
from llamatune.shapes.capabilities import Capability
from llamatune.shapes.dtypes import PRECISIONS
from llamatune.shapes.gpu_advice import ENOUGH_FOR_7B_IN_16_BITS, advise, refusal, slower_settings
from llamatune.shapes.presets import preset
from llamatune.shapes.torch_builds import Cuda, build_for, fitting_build, has_kernels, wheel
from llamatune.spec import build_spec

GIB = 1 << 30
FLASH, EFFICIENT = "FlashAttention", "torch's memory-efficient kernel"
BUILDS = {
    "CUDA 12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "CUDA 12.8": ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
    "CUDA 13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}
OLD = ("bf16", "TF32", "FlashAttention", "Triton kernels", "FP8")
V100, LATER, LATEST = "CUDA 12.6, torch 2.10 to 2.14", "CUDA 12.6 or later", "CUDA 12.8 or later"


@pytest.mark.parametrize(
    ("capability", "gib", "precision", "dtype_for_7b", "attention", "lacks", "built"),
    [
        ((6, 1), 11, "fp16", "nf4", EFFICIENT, ("tensor cores", *OLD), V100),  # GTX 1080 Ti
        ((7, 0), 16, "fp16", "float16", EFFICIENT, OLD, V100),  # V100
        ((7, 0), 32, "fp16", "float16", EFFICIENT, OLD, V100),
        ((7, 5), 14.6, "fp16", "nf4", EFFICIENT, OLD, LATER),  # T4
        ((7, 5), 11, "fp16", "nf4", EFFICIENT, OLD, LATER),  # RTX 2080 Ti
        ((8, 6), 12, "bf16", "nf4", FLASH, ("FP8",), LATER),  # RTX 3060
        ((8, 6), 24, "bf16", "bfloat16", FLASH, ("FP8",), LATER),  # RTX 3090
        ((8, 9), 8, "bf16", "nf4", FLASH, (), LATER),  # RTX 4060
        ((8, 9), 24, "bf16", "bfloat16", FLASH, (), LATER),  # RTX 4090, L4
        ((8, 0), 40, "bf16", "bfloat16", FLASH, ("FP8",), LATER),  # A100
        ((9, 0), 80, "bf16", "bfloat16", FLASH, (), LATER),  # H100
        ((9, 0), 141, "bf16", "bfloat16", FLASH, (), LATER),  # H200
        ((10, 0), 180, "bf16", "bfloat16", FLASH, (), LATEST),  # B200
        ((12, 0), 32, "bf16", "bfloat16", FLASH, (), LATEST),  # RTX 5090
        ((8, 7), 32, "bf16", "bfloat16", FLASH, ("FP8",), "NVIDIA's own for Jetson"),  # Orin
        ((13, 0), 64, "bf16", "bfloat16", FLASH, (), LATEST),  # what does not exist yet
    ],
)
def test_the_table_of_gpus(
    capability: Capability,
    gib: float,
    precision: str,
    dtype_for_7b: str,
    attention: str,
    lacks: tuple[str, ...],
    built: str,
) -> None:
    advice = advise(capability, int(gib * GIB))
    assert (advice.precision, advice.dtype) == (precision, PRECISIONS[precision])
    assert (advice.dtype_for_7b, advice.attention, advice.lacks) == (dtype_for_7b, attention, lacks)
    assert wheel(capability) == built
    for dtype in (advice.dtype, advice.dtype_for_7b):
        assert refusal(capability, precision, dtype) is None
        assert slower_settings(capability, precision, dtype, lora=True) == [], "what is advised is left in peace"


@pytest.mark.parametrize(
    "capability", [(5, 2), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
)
def test_the_builds_that_are_named_have_kernels(capability: Capability) -> None:
    named = wheel(capability)
    able = {build for build, architectures in BUILDS.items() if has_kernels(capability, architectures)}
    if named == LATEST:
        assert able == set(BUILDS) - {"CUDA 12.6"}
    else:
        assert "CUDA 12.6" in able
        assert ("CUDA 13.0" in able) is (named == LATER)
    assert "install" in build_for(capability)


@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [
        ((7, 0), (13, 0), "2.10 to 2.14 built for CUDA 12.6: pip install 'torch>=2.10,<2.15' --index-url"),  # V100
        ((7, 0), (12, 2), "2.10 to 2.14 built for CUDA 12.6: pip install"),
        ((7, 0), (11, 4), "update the NVIDIA driver to release 580 or later, then install torch 2.10 to 2.14"),
        ((7, 5), (13, 0), "2.11 or later built for CUDA 13.0: pip install 'torch>=2.11'"),  # T4
        ((7, 5), (12, 4), "2.10 to 2.14 built for CUDA 12.6: pip"),
        ((7, 5), None, "2.11 or later built for CUDA 13.0: pip"),
        ((9, 0), (12, 8), "2.10 to 2.14 built for CUDA 12.6: pip"),
        ((10, 0), (12, 8), "2.10 or 2.11 built for CUDA 12.8: pip"),  # B200
        ((12, 0), (13, 1), "2.11 or later built for CUDA 13.0: pip"),
        ((8, 7), (12, 6), "NVIDIA's build of torch for Jetson"),
        ((3, 7), (11, 4), "use a newer GPU"),
    ],
)
def test_the_build_suits_the_gpu_and_the_driver(capability: Capability, driver: Cuda | None, expected: str) -> None:
    assert expected in build_for(capability, driver)


def test_a_build_that_is_advised_has_kernels_and_runs_with_the_driver() -> None:
    """Against the architectures that torch's own list of its wheels has."""
    for capability in [(5, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        for driver in [(12, 0), (12, 4), (12, 8), (13, 0), (13, 2)]:
            build = fitting_build(capability, driver)
            assert build is not None
            assert build.cuda[0] <= driver[0]
            assert has_kernels(capability, BUILDS["CUDA {}.{}".format(*build.cuda)])
        assert fitting_build(capability, (11, 8)) is None
    assert {"CUDA {}.{}".format(*build.cuda) for build in torch_builds.BUILDS} == set(BUILDS)


def test_a_gpu_that_no_build_supports_is_told_so() -> None:
    assert (wheel((3, 7)), build_for((3, 7))) == ("none", "use a newer GPU")
    assert build_for((8, 7)).startswith("install NVIDIA's build of torch for Jetson")


def test_a_7b_is_advised_in_16_bits_only_where_it_fits() -> None:
    config, lengths = preset("llama-2-7b"), [512] * 8

    def fits(memory: int, dtype: str) -> bool:
        values = {"model": {"path": "x", "dtype": dtype}, "lora": {}, "data": {"train": "x"}}
        spec = build_spec({**values, "training": {"output_dir": "x"}}, "test")
        limit = (memory - GIB // 2) * 9 // 10  # CUDA's own part
        return plan_memory(spec, config, heaviest_rows(lengths, lengths, spec), (8, 0), limit).fits

    assert fits(ENOUGH_FOR_7B_IN_16_BITS, "bfloat16")
    assert not fits(ENOUGH_FOR_7B_IN_16_BITS - GIB // 2, "bfloat16")
    assert fits(8 * GIB, "nf4"), "which an RTX 4060 has"


@pytest.mark.parametrize(
    ("capability", "precision", "dtype", "lora", "expected"),
    [
        ((8, 0), "fp32", "bfloat16", True, "fp32 does not use the tensor cores.*; bf16 computes several .*tf32"),
        ((9, 0), "fp32", "float32", True, "bf16 with model.dtype: bfloat16 computes several times as fast; tf32"),
        ((9, 0), "fp32", "float32", False, "bf16 computes several times as fast; tf32"),
        ((9, 0), "fp32", "nf4", True, "bf16 computes several times as fast; tf32"),
        ((7, 5), "fp32", "float32", True, "fp16 with model.dtype: float16 computes several times as fast$"),
        ((6, 1), "fp32", "float32", True, None),
        ((9, 0), "tf32", "float32", True, None),
        ((9, 0), "fp16", "float16", True, "fp16 may overflow.*; bf16 with model.dtype: bfloat16 is as fast"),
        ((9, 0), "fp16", "float32", False, "fp16 may overflow.*; bf16 is as fast"),
        ((9, 0), "fp16", "nf4", True, "fp16 may overflow.*; bf16 is as fast"),
        ((7, 5), "fp16", "nf4", True, None),
        ((8, 6), "bf16", "float32", True, "cast to bfloat16 for each product and takes twice.*; model.dtype: b"),
        ((8, 6), "bf16", "float16", True, "float16 is cast to bfloat16 for each product; model.dtype: bfloat16 is fa"),
        ((8, 6), "bf16", "float32", False, None),
        ((7, 5), "fp16", "float32", True, "cast to float16 for each product and takes twice.*; model.dtype: fl"),
    ],
)  # fmt: skip
def test_what_is_slower_than_the_gpu_allows_is_told_in_one_line(
    capability: Capability, precision: str, dtype: str, lora: bool, expected: str | None
) -> None:
    lines = slower_settings(capability, precision, dtype, lora)
    assert len(lines) == (expected is not None)
    assert expected is None or re.search(expected, lines[0])


@pytest.mark.parametrize(
    ("capability", "precision", "dtype", "expected"),
    [
        (
            (7, 5), "bf16", "bfloat16",
            ("bf16", "training.precision, model.dtype", "set them to fp16 and float16, nf4 or float8"),
        ),
        ((7, 0), "bf16", "nf4", ("bf16", "training.precision", "set it to fp16")),
        ((7, 0), "fp16", "bfloat16", ("bf16", "model.dtype", "set it to float16, nf4 or float8")),
        ((7, 5), "tf32", "bfloat16", ("TF32", "training.precision", "set it to fp32 or fp16")),
        (None, "tf32", "bfloat16", ("TF32", "training.precision", "set it to fp32")),
        (None, "bf16", "bfloat16", None),
        ((8, 0), "tf32", "bfloat16", None),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_what_to_set(
    capability: Capability | None, precision: str, dtype: str, expected: tuple[str, str, str] | None
) -> None:
    found = refusal(capability, precision, dtype)
    assert (None if found is None else (found.lacks, found.where, found.todo)) == expected

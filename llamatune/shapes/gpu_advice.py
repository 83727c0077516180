"""What to train with on a GPU, by its compute capability and memory, and what is slower there. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from llamatune.shapes.attention_kernels import Kernel, choose_kernel
from llamatune.shapes.capabilities import OLDEST_WITH_BF16, OLDEST_WITH_TENSOR_CORES, Capability, lacking
from llamatune.shapes.dtypes import PRECISIONS

ENOUGH_FOR_7B_IN_16_BITS = 15 << 30
"""Of LLaMA-2-7B, q and v, rows of 512 tokens: 12.6 GiB of weights, and a tenth of the memory stays free."""

_BF16, _FP16 = ("bf16", "bfloat16"), ("fp16", "float16")


@dataclass(frozen=True)
class GpuAdvice:
    """``training.precision`` and ``model.dtype``, what computes attention then, and the features that the GPU lacks.

    ``dtype_for_7b`` is ``nf4`` where a 7B does not fit in 16 bits.
    """

    precision: str
    dtype: str
    dtype_for_7b: str
    attention: str
    lacks: tuple[str, ...]


def advise(capability: Capability, memory_bytes: int) -> GpuAdvice:
    """The settings for such a GPU: bf16 where there is bf16, else fp16, which takes half the memory of fp32."""
    precision, dtype = _sixteen_bits(capability)
    of_7b = dtype if memory_bytes >= ENOUGH_FOR_7B_IN_16_BITS else "nf4"
    efficient = choose_kernel(capability, dtype, 128, 512) is Kernel.EFFICIENT
    attention = "torch's memory-efficient kernel" if efficient else "FlashAttention"
    return GpuAdvice(precision, dtype, of_7b, attention, lacking(capability))


def _sixteen_bits(capability: Capability) -> tuple[str, str]:
    return _BF16 if capability >= OLDEST_WITH_BF16 else _FP16


def sixteen_bits(gpu: bool | Capability | None) -> tuple[str, str]:
    """``training.precision`` and ``model.dtype`` in 16 bits, on what a step is planned for (``Gpu``)."""
    return _sixteen_bits(gpu) if isinstance(gpu, tuple) else _BF16


@dataclass(frozen=True)
class Refusal:
    """What a GPU cannot compute, which keys of the spec ask for it, and what to set them to."""

    lacks: str
    where: str
    todo: str


def refusal(capability: Capability | None, precision: str, dtype: str) -> Refusal | None:
    """What of the spec a device cannot compute; None: it can. A CPU, whose ``capability`` is None, has bf16."""
    old = capability is not None and capability < OLDEST_WITH_BF16
    if precision == "tf32" and (old or capability is None):
        return Refusal("TF32", "training.precision", "set it to fp32 or fp16" if old else "set it to fp32")
    wanted = {"training.precision": ("fp16", PRECISIONS[precision]), "model.dtype": ("float16, nf4 or float8", dtype)}
    asking = {key: instead for key, (instead, asked) in wanted.items() if asked == "bfloat16"}
    if not old or not asking:
        return None
    pronoun = "it" if len(asking) == 1 else "them"
    return Refusal("bf16", ", ".join(asking), f"set {pronoun} to {' and '.join(asking.values())}")


def slower_settings(capability: Capability, precision: str, dtype: str, lora: bool) -> list[str]:
    """What in the spec is slower, or less safe, than the GPU allows, and what to set; a line each."""
    best, best_dtype = _sixteen_bits(capability)
    held = ("float32", "float16", "bfloat16")
    with_dtype = f" with model.dtype: {best_dtype}" if lora and dtype in held and dtype != best_dtype else ""
    if precision == "fp32" and capability >= OLDEST_WITH_TENSOR_CORES:
        other = "; tf32 is faster too, without another change" if best == "bf16" else ""
        idle = "training.precision: fp32 does not use the tensor cores of this GPU"
        return [f"{idle}; {best}{with_dtype} computes several times as fast{other}"]
    if precision == "fp16" and best == "bf16":
        risk = "training.precision: fp16 may overflow, and a window that does makes no update"
        return [f"{risk}; bf16{with_dtype} is as fast on this GPU and has the range of fp32"]
    computed = PRECISIONS[precision]
    if lora and computed != "float32" and dtype in held and dtype != computed:
        room = " and takes twice the memory" if dtype == "float32" else ""
        return [f"model.dtype: {dtype} is cast to {computed} for each product{room}; model.dtype: {computed} is faster"]
    return []

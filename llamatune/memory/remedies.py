"""Remedies: changes of the spec that lower the predicted peak, least added computation first."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llamatune.memory.plan import MemoryPlan, plan_memory
from llamatune.memory.sizes import Rows
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.dtypes import PRECISIONS, QUANTIZED_DTYPES
from llamatune.shapes.gpu_advice import sixteen_bits
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute
from llamatune.spec import RunSpec, build_spec
from llamatune.spec_sections import LoraSection
from llamatune.units import gibibytes

_LESS = 0.8
"""The share of the predicted peak to aim for after a step ran out of memory."""


@dataclass(frozen=True)
class Remedy:
    """A change of the spec. ``more_compute`` is the share that it adds to a step's products.

    None: it depends on the device, or the products change.
    """

    change: str
    effect: str
    more_compute: float | None
    peak_bytes: int
    saved_bytes: int
    fits: bool

    def advice(self) -> str:
        """``training.optimizer=adamw_8bit: about 12.1 GiB``."""
        return f"{self.change} ({self.effect}): about {gibibytes(self.peak_bytes)}"


def after_running_out(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> str:
    """The failed step and three changes to try next, after a run that ran out of memory.

    First the changes that lower the peak to four fifths, least computation first, then those that save most. Under a
    limit, fused blocks answer most changes by recomputing less, so there a lower limit comes first.
    """
    target = int(plan.step.peak * _LESS)
    helpful = remedies(spec, config, plan, cuda)
    if plan.levels is not None and spec.training.activation_checkpointing == "none":
        lower = plan_memory(spec, config, plan.rows, cuda, target)
        if lower.step.peak < plan.step.peak:
            change = f"training.memory_limit={math.ceil(lower.step.peak / 2**20)}MiB"
            saved = plan.step.peak - lower.step.peak
            helpful.insert(0, Remedy(change, "blocks recompute more", None, lower.step.peak, saved, lower.fits))
    # A stable sort: those that reach the target are all alike, and stay in their order.
    helpful.sort(key=lambda remedy: max(target, remedy.peak_bytes))
    count, tokens = len(plan.rows.lengths), plan.rows.tokens
    advice = "; ".join(remedy.advice() for remedy in helpful[:3])
    tried = f"a pass over {count} samples, {tokens} tokens, was to need {plan.room()}"
    return f"{tried}; try {advice}" if advice else tried


def remedies(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> list[Remedy]:
    """Every change that is not made yet and lowers the peak by more than a thousandth, each by itself."""
    helpful, values = [], spec.model_dump(exclude={"lora"} if spec.lora is None else None)
    for change, effect, more_compute, rows in _changes(spec, config, plan.rows, cuda):
        overrides = [word for word in change.split() if "=" in word]  # none where the rows alone change
        changed = build_spec(copy.deepcopy(values), change, overrides)
        after = plan_memory(changed, config, rows, cuda, plan.limit_bytes)
        saved = plan.step.peak - after.step.peak
        if saved > plan.step.peak // 1000:
            helpful.append(Remedy(change, effect, more_compute, after.step.peak, saved, after.fits))
    return helpful


def _changes(
    spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu
) -> Iterator[tuple[str, str, float | None, Rows]]:
    """The change, its effect and its added computation as in ``Remedy``, and the micro-batch behind it."""
    training, lora, dtype = spec.training, spec.lora, spec.model.dtype
    size, steps, longest = training.micro_batch_size, training.gradient_accumulation_steps, max(rows.lengths)
    if lora and not training.fused:
        yield "training.fused=true", "the same, keeping less", 0.0, rows
    computed = PRECISIONS[training.precision]
    if lora and dtype == "float32" and computed != "float32":
        yield f"model.dtype={computed}", "frozen weights in 16 bits", 0.0, rows
    if computed == "float32":
        precision, sixteen = sixteen_bits(cuda)
        weights = f"model.dtype={sixteen} " if lora and dtype == "float32" else ""
        yield f"{weights}training.precision={precision}", "all in 16 bits but what is trained", 0.0, rows
    if isinstance(training.tokens_per_pass, int) and len(rows.lengths) > size and not spec.data.packing:
        alone = replace(_of(rows, rows.lengths[:size]), passes=None)
        yield "training.tokens_per_pass=null", "each micro-batch by itself", 0.0, alone
    if size > 1:
        change = f"training.micro_batch_size={size // 2} training.gradient_accumulation_steps={steps * 2}"
        yield change, "about as many rows an update, in smaller passes", 0.0, _fewer(rows, size // 2 / size)
    if training.optimizer == "adamw":
        yield "training.optimizer=adamw_8bit", "its state in 8 bits", 0.0, rows
    if training.activation_checkpointing != "block":
        share = recomputed_share(config, Recompute.BLOCK) if training.fused else 1 / 2
        change = "training.activation_checkpointing=block"
        yield change, "every block computed again", share if lora else 1 / 3, rows
    if lora and dtype not in QUANTIZED_DTYPES:
        yield "model.dtype=float8", "frozen weights in 8 bits, unpacked or multiplied in float8", None, rows
    if lora and dtype != "nf4":
        yield "model.dtype=nf4", "frozen weights in 4 bits, unpacked for each product", None, rows
    if lora and spec.model.placement in ("auto", "device") and (cuda or rows.ranks > 1):
        other, where = ("shard", "slices on all ranks") if rows.ranks > 1 else ("host", "host memory")
        yield f"model.placement={other}", f"the blocks' frozen weights in {where}", None, rows
    if lora and lora.modules_to_save:
        yield "lora.modules_to_save=[]", "trains the update alone", None, rows
    if not lora:
        yield f"lora.r={LoraSection().r}", "trains an adapter alone", None, rows
    elif lora.r > 1:
        yield f"lora.r={lora.r // 2}", "a smaller adapter", None, rows
    if longest >= 64:
        packed = spec.data.packing
        effect = "prepare-data --max-seq-length" + (", data.packed_tokens" if packed else "")
        shorter = _fewer(rows, 0.5) if packed else _of(rows, tuple(max(1, length // 2) for length in rows.lengths))
        yield f"rows of at most {longest // 2} tokens", effect, None, shorter
    if training.optimizer != "sgd":
        yield "training.optimizer=sgd", "keeps no state", None, rows


def recomputed_share(config: LlamaConfig, level: Recompute) -> float:
    """What a level adds to the products of a LoRA step: forward once, and once more to the gradient of the input."""
    counts = {name: math.prod(config.linear_shape(name)) for name in LINEAR_MODULES}
    return sum(counts[name] for name in level.modules) / (2 * sum(counts.values()))


def _fewer(rows: Rows, share: float) -> Rows:
    """So many of the samples."""
    return _of(rows, rows.lengths[: max(1, round(len(rows.lengths) * share))])


def _of(rows: Rows, lengths: tuple[int, ...]) -> Rows:
    return replace(rows, lengths=lengths, targets=max(1, round(rows.targets * sum(lengths) / rows.tokens)))

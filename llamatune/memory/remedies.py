"""Remedies: changes of the spec that lower the predicted peak, least added computation first."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from llamatune.memory.plan import MemoryPlan, plan_memory
from llamatune.memory.recompute_choice import recomputed_share
from llamatune.memory.sizes import Rows
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.config import LlamaConfig
from llamatune.shapes.levels import Recompute
from llamatune.spec import LoraSection, RunSpec
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

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def after_running_out(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> str:
    """The failed step and three changes to try next, after a run that ran out of memory.

    First the changes that lower the peak to four fifths, least computation first, then those that save most. Under a
    limit, lean blocks answer most changes by recomputing less, so there a lower limit comes first.
    """
    target = int(plan.step.peak * _LESS)
    helpful = remedies(spec, config, plan, cuda)
    if plan.levels is not None and spec.training.activation_checkpointing == "none":
        lower = plan_memory(spec, config, plan.rows, cuda, target)
        if lower.step.peak < plan.step.peak:
            change = f"training.memory_limit={math.ceil(lower.step.peak / 2**20)}MiB"
            saved = plan.step.peak - lower.step.peak
            helpful.insert(0, Remedy(change, "blocks recompute more", None, lower.step.peak, saved, lower.fits))
    enough = [remedy for remedy in helpful if remedy.peak_bytes <= target]
    others = sorted((remedy for remedy in helpful if remedy.peak_bytes > target), key=lambda remedy: remedy.peak_bytes)
    count, tokens = len(plan.rows.lengths), plan.rows.tokens
    advice = "; ".join(remedy.advice() for remedy in (enough + others)[:3])
    tried = f"a pass over {count} samples, {tokens} tokens, was to need {plan.room()}"
    return f"{tried}; try {advice}" if advice else tried


def remedies(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> list[Remedy]:
    """Every change that is not made yet and lowers the peak by more than a thousandth, each by itself."""
    helpful: list[Remedy] = []
    training, lora = spec.training, spec.lora

    def consider(change: str, effect: str, more: float | None, changed: RunSpec, rows: Rows = plan.rows) -> None:
        after = plan_memory(changed, config, rows, cuda, plan.limit_bytes)
        saved = plan.step.peak - after.step.peak
        if saved > plan.step.peak // 1000:
            helpful.append(Remedy(change, effect, more, after.step.peak, saved, after.fits))

    def with_training(**changes: Any) -> RunSpec:
        return spec.model_copy(update={"training": training.model_copy(update=changes)})

    def with_dtype(dtype: str) -> RunSpec:
        return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})

    if lora is not None and not training.fused:
        consider("training.fused=true", "the same, keeping less", 0.0, with_training(fused=True))
    narrow = {"bf16": "bfloat16", "fp16": "float16"}.get(training.precision)
    if lora is not None and spec.model.dtype == "float32" and narrow is not None:
        consider(f"model.dtype={narrow}", "frozen weights in 16 bits", 0.0, with_dtype(narrow))
    if training.precision == "fp32":
        wide = lora is not None and spec.model.dtype == "float32"
        changed = with_training(precision="bf16").model_copy(
            update={"model": with_dtype("bfloat16").model} if wide else {}
        )
        change = "model.dtype=bfloat16 " * wide + "training.precision=bf16"
        consider(change, "all in 16 bits but what is trained", 0.0, changed)
    if training.micro_batch_size > 1:
        size, steps = training.micro_batch_size // 2, training.gradient_accumulation_steps * 2
        consider(
            f"training.micro_batch_size={size} training.gradient_accumulation_steps={steps}",
            "about as many rows an update, in smaller passes",
            0.0,
            with_training(micro_batch_size=size, gradient_accumulation_steps=steps),
            _fewer(plan.rows, size / training.micro_batch_size),
        )
    if training.optimizer == "adamw":
        consider("training.optimizer=adamw_8bit", "its state in 8 bits", 0.0, with_training(optimizer="adamw_8bit"))
    if training.activation_checkpointing != "block":
        share = 1 / 3
        if lora is not None:
            share = recomputed_share(config, (Recompute.BLOCK,)) if training.fused else 1 / 2
        consider(
            "training.activation_checkpointing=block",
            "every block computed again",
            share,
            with_training(activation_checkpointing="block"),
        )
    if lora is not None and spec.model.dtype != "nf4":
        consider("model.dtype=nf4", "frozen weights in 4 bits, unpacked for each product", None, with_dtype("nf4"))
    if lora is None:
        changed = spec.model_copy(update={"lora": LoraSection()})
        consider(f"lora.r={LoraSection().r}", "trains an adapter alone", None, changed)
    if lora is not None and lora.r > 1:
        changed = spec.model_copy(update={"lora": lora.model_copy(update={"r": lora.r // 2})})
        consider(f"lora.r={lora.r // 2}", "a smaller adapter", None, changed)
    longest = max(plan.rows.lengths)
    if longest >= 64:
        consider(
            f"rows of at most {longest // 2} tokens",
            "prepare-data --max-seq-length" + (", data.packed_tokens" if spec.data.packing else ""),
            None,
            spec,
            _halved(plan.rows) if not spec.data.packing else _fewer(plan.rows, 0.5),
        )
    if training.optimizer != "sgd":
        consider("training.optimizer=sgd", "keeps no state", None, with_training(optimizer="sgd"))
    return helpful


def _fewer(rows: Rows, share: float) -> Rows:
    """So many of the samples."""
    return _of(rows, rows.lengths[: max(1, round(len(rows.lengths) * share))])


def _halved(rows: Rows) -> Rows:
    """Every sample half as long."""
    return _of(rows, tuple(max(1, length // 2) for length in rows.lengths))


def _of(rows: Rows, lengths: tuple[int, ...]) -> Rows:
    return Rows(lengths, max(1, round(rows.targets * sum(lengths) / rows.tokens)))

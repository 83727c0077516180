"""What makes a step fit that does not, the cheapest in computation first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llamatune.memory.plan import MemoryPlan, plan_memory, recomputed_share
from llamatune.memory.sizes import Rows
from llamatune.model.config import LlamaConfig
from llamatune.spec import LoraSection, RunSpec
from llamatune.units import gibibytes


@dataclass(frozen=True)
class Remedy:
    """A change of the spec. ``more_compute`` is the share that it adds to a step's products.

    None: that depends on the device, or other products are computed.
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


def remedies(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: bool) -> list[Remedy]:
    """Everything that is not on yet and lowers the peak, each by itself."""
    found: list[Remedy] = []
    training, lora = spec.training, spec.lora

    def consider(change: str, effect: str, more: float | None, changed: RunSpec, rows: Rows = plan.rows) -> None:
        after = plan_memory(changed, config, rows, cuda, plan.limit_bytes)
        saved = plan.step.peak - after.step.peak
        if saved > 0:
            found.append(Remedy(change, effect, more, after.step.peak, saved, after.fits))

    def with_training(**changes: Any) -> RunSpec:
        return spec.model_copy(update={"training": training.model_copy(update=changes)})

    def with_dtype(dtype: str) -> RunSpec:
        return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})

    if lora is not None and not training.fused:
        consider("training.fused=true", "the same, keeping less", 0.0, with_training(fused=True))
    narrow = {"bf16": "bfloat16", "fp16": "float16"}.get(training.precision)
    if lora is not None and spec.model.dtype == "float32" and narrow is not None:
        consider(f"model.dtype={narrow}", "frozen weights in 16 bits", 0.0, with_dtype(narrow))
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
            share = recomputed_share(config, (3,)) if training.fused else 1 / 2
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
        consider("a lora section", "trains an adapter alone", None, changed)
    longest = max(plan.rows.lengths)
    if longest >= 64:
        consider(
            f"rows of at most {longest // 2} tokens",
            "prepare-data --max-seq-length" + (", data.packed_tokens" if spec.data.packing else ""),
            None,
            spec,
            _halved(plan.rows) if not spec.data.packing else _fewer(plan.rows, 0.5),
        )
    return found


def _fewer(rows: Rows, share: float) -> Rows:
    """So many of the samples."""
    return _of(rows, rows.lengths[: max(1, round(len(rows.lengths) * share))])


def _halved(rows: Rows) -> Rows:
    """Every sample half as long."""
    return _of(rows, tuple(max(1, length // 2) for length in rows.lengths))


def _of(rows: Rows, lengths: tuple[int, ...]) -> Rows:
    return Rows(lengths, max(1, round(rows.targets * sum(lengths) / rows.tokens)))

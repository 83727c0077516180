"""The choice of settings that fit: dtype, placement, rows of a pass and of an update, by the memory plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.errors import EnvironmentFault
from llamatune.memory.plan import MemoryPlan, limit_of
from llamatune.memory.planned_run import plan_of_run
from llamatune.memory.remedies import remedies
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.gpu_advice import sixteen_bits
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec, build_spec
from llamatune.spec_overrides import overridden_field
from llamatune.spec_sections import FULL_LEARNING_RATE, LORA_LEARNING_RATE
from llamatune.starting_spec.row_lengths import RowLengths
from llamatune.units import gibibytes

ROWS_OF_AN_UPDATE = 8
_SHORTEST_ROWS = 256
"""Rows are not cut below this to make a step fit."""
Values = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Device:
    """What a spec is for. ``name`` as a comment says it; ``memory_bytes``: all of it."""

    name: str
    gpu: Gpu
    memory_bytes: int


@dataclass(frozen=True)
class Chosen:
    """A spec that fits: its values in the order in which they are written, and why each is what it is."""

    values: Values
    reasons: dict[str, str]
    spec: RunSpec
    plan: MemoryPlan
    rows: RowLengths
    device: Device


@dataclass(frozen=True)
class _Attempt:
    precision: str
    dtype: str
    placement: str = "device"
    targets: str = "all-linear"


def choose(
    model: str, config: LlamaConfig, rows: RowLengths, device: Device, output_dir: str, overrides: Sequence[str]
) -> Chosen:
    """The first of several settings that fits, the best first.

    In 16 bits on the device, then in 4, then, of rows that are still to be prepared, shorter ones, then with the frozen
    weights in host memory. ``overrides`` are settings that the user made.

    Raises:
        SpecError: an override is wrong.
        EnvironmentFault: nothing fits; it names what would.
    """
    values = _values(model, rows, output_dir, overrides)
    first: tuple[RunSpec, MemoryPlan] | None = None
    for fitted, attempt in _attempts(rows, device, "lora" in values):
        tried = _with(values, attempt)
        spec = build_spec(copy.deepcopy(tried), "init", overrides)
        spec, plan = _planned(spec, config, fitted, device)
        first = first or (spec, plan)
        if plan.fits:
            break
    else:
        assert first is not None
        raise _nothing_fits(*first, config, device)
    tried, plan = _joined(tried, plan, overrides, config, fitted, device)
    spec = build_spec(copy.deepcopy(tried), "init", overrides)
    reasons = _reasons(spec, plan, first[1], fitted, config, device)
    written = _overridden(tried, spec, overrides)
    given = {".".join(overridden_field(text)[:2]) for text in overrides}
    reasons |= {f"{section}.{key}": "as you chose" for section in written for key in written[section]
                if {section, f"{section}.{key}"} & given}  # fmt: skip
    return Chosen(written, reasons, build_spec(copy.deepcopy(written), "init"), plan, fitted, device)


def _values(model: str, rows: RowLengths, output_dir: str, overrides: Sequence[str]) -> Values:
    """Every key that is written, those left out that an override excludes."""
    lora = not any(text.startswith("lora=null") for text in overrides)
    values: Values = {
        "model": {"path": model, "dtype": "float32"},
        **({"lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"}} if lora else {}),
        "data": {"train": str(rows.directory)},
        "training": {
            "output_dir": output_dir,
            "num_epochs": 3,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": _power_of_two(min(ROWS_OF_AN_UPDATE, len(rows.lengths))),
            "learning_rate": LORA_LEARNING_RATE if lora else FULL_LEARNING_RATE,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.03,
            "precision": "fp32",
            "activation_checkpointing": "none",
        },
    }
    for given, excluded in (("max_steps", "num_epochs"), ("warmup_steps", "warmup_ratio")):
        if any(text.startswith(f"training.{given}=") for text in overrides):
            del values["training"][excluded]
    return values


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


def _attempts(rows: RowLengths, device: Device, lora: bool) -> Iterator[tuple[RowLengths, _Attempt]]:
    precision, dtype = sixteen_bits(device.gpu)
    on_cpu = [("fp32", "float32"), ("bf16", "bfloat16"), ("bf16", "nf4")]
    pairs = [(precision, dtype), (precision, "nf4")] if device.gpu else on_cpu
    if not lora:  # what is trained is held in fp32
        pairs = [(precision if device.gpu else "fp32", "float32")]
    shorter = [rows]
    while rows.max_seq_length is not None and shorter[-1].longest // 2 >= _SHORTEST_ROWS:
        shorter.append(rows.shorter(shorter[-1].longest // 2))
    for fitted in shorter:
        yield from ((fitted, _Attempt(*pair)) for pair in pairs)
    if lora:
        yield from ((fitted, _Attempt(*pairs[-1], targets="q_proj,v_proj")) for fitted in shorter)
        if device.gpu:
            yield from ((rows, _Attempt(*pair, placement="host")) for pair in reversed(pairs))


def _with(values: Values, attempt: _Attempt) -> Values:
    tried = copy.deepcopy(values)
    tried["model"] |= {"dtype": attempt.dtype, "placement": attempt.placement}
    tried["training"]["precision"] = attempt.precision
    if "lora" in tried:
        tried["lora"]["target_modules"] = attempt.targets.split(",") if "," in attempt.targets else attempt.targets
    return tried


def _planned(spec: RunSpec, config: LlamaConfig, rows: RowLengths, device: Device) -> tuple[RunSpec, MemoryPlan]:
    config = config.with_layers(spec.model.num_layers)
    limit = limit_of(spec, device.memory_bytes)
    return plan_of_run(spec, config, rows.lengths, rows.targets, device.gpu, limit)


def _joined(
    tried: Values, plan: MemoryPlan, overrides: Sequence[str], config: LlamaConfig, rows: RowLengths, device: Device
) -> tuple[Values, MemoryPlan]:
    """With as many rows in a micro-batch as a pass computes at once without more recomputation."""
    training = tried["training"]
    together = training["gradient_accumulation_steps"]
    size = min(together, _power_of_two(len(plan.rows.lengths)))
    if any(text.startswith(("training.micro_batch_size=", "training.grad")) for text in overrides):
        size = 1
    while size > 1:
        more = {"micro_batch_size": size, "gradient_accumulation_steps": together // size}
        larger = tried | {"training": training | more}
        _, other = _planned(build_spec(copy.deepcopy(larger), "init", overrides), config, rows, device)
        if other.fits and other.levels == plan.levels:
            return larger, other
        size //= 2
    return tried, plan


def _overridden(values: Values, spec: RunSpec, overrides: Sequence[str]) -> Values:
    """The values with what ``overrides`` set, as the spec understood it; ``lora=null`` left out of it already."""
    written, resolved = copy.deepcopy(values), spec.model_dump(mode="json")
    if written["model"]["placement"] == "device":  # as auto decides where it fits
        del written["model"]["placement"]
    for text in overrides:
        section, *keys = overridden_field(text)
        if resolved.get(section) is None:
            written.pop(section, None)
            continue
        names = keys[:1] or [name for name in resolved[section] if name in _given(spec, section)]
        written.setdefault(section, {}).update({name: resolved[section][name] for name in names})
    return {name: kept for name, kept in written.items() if resolved.get(name) is not None}


def _given(spec: RunSpec, section: str) -> set[str]:
    """The keys of a section that were given."""
    given: set[str] = getattr(spec, section).model_fields_set
    return given


def _reasons(
    spec: RunSpec, plan: MemoryPlan, best: MemoryPlan, rows: RowLengths, config: LlamaConfig, device: Device
) -> dict[str, str]:
    """By key path, in one short sentence each."""
    training, count = spec.training, count_parameters(config.with_layers(spec.model.num_layers), spec.adapter)
    per_update = training.micro_batch_size * training.gradient_accumulation_steps
    updates = -(-len(rows.lengths) // per_update)
    rows_of = f"{per_update} rows an update"
    told = {
        "model.path": f"{count.base_parameters:,} parameters, {config.num_hidden_layers} layers",
        "model.dtype": _why_dtype(spec, best, device),
        "model.placement": "frozen weights lie in host memory: all that fits, and slower",
        "lora.r": f"{count.trainable_parameters:,} trained parameters ({count.trainable_percent:.2f} %)",
        "lora.alpha": "the update is scaled by alpha / r; 32 at every rank",
        "lora.target_modules": "attention alone learns less for the same parameters",
        "data.train": "the directory that prepare-data writes" if rows.max_seq_length else rows.source,
        "training.output_dir": "the same command continues what is there",
        "training.num_epochs": "more overfit a small set" + (f"; {updates:,} updates each" if rows.measured else ""),
        "training.micro_batch_size": _why_rows(plan),
        "training.gradient_accumulation_steps": f"{rows_of}: LoRA learns less at large batches",
        "training.learning_rate": _why_rate(spec),
        "training.lr_scheduler": "falls to 0, so that the last updates are small",
        "training.warmup_ratio": "rises over the first updates, while Adam's averages fill",
        "training.precision": _why_precision(spec, device),
        "training.activation_checkpointing": f"as memory needs it; here {plan.recomputing() or 'nothing'}",
    }
    if spec.lora is not None and len(spec.lora.target_modules) == 2:
        told["lora.target_modules"] = "of each block: with all seven matrices the step does not fit"
    return told


def _why_dtype(spec: RunSpec, best: MemoryPlan, device: Device) -> str:
    if spec.lora is None:
        return "what is trained is held in fp32, or small updates are lost"
    if spec.model.dtype == "nf4":
        best_bits = "16 bits" if device.gpu else "fp32"
        return f"QLoRA: in {best_bits} a step needs {best.room()}"
    if spec.model.dtype == "float32":
        return "a CPU computes in it, and it fits"
    return "16 bits, as the products: nothing is cast"


def _why_precision(spec: RunSpec, device: Device) -> str:
    if spec.training.precision == "fp16":
        return "this GPU has no bf16; loss scaling is on"
    return "all in fp32" if spec.training.precision == "fp32" else "the range of fp32, at the speed of 16 bits"


def _why_rows(plan: MemoryPlan) -> str:
    return f"a pass of the longest rows has {plan.rows.tokens:,} tokens: {plan.room()}"


def _why_rate(spec: RunSpec) -> str:
    if spec.lora is None:
        return "of full fine-tuning; a tenth of LoRA's"
    return "LoRA's at every rank, ten times that of full fine-tuning; jumps: halve it"


def _nothing_fits(spec: RunSpec, plan: MemoryPlan, config: LlamaConfig, device: Device) -> EnvironmentFault:
    offered = remedies(spec, config.with_layers(spec.model.num_layers), plan, device.gpu)
    helpful = sorted(offered, key=lambda remedy: (not remedy.fits, remedy.peak_bytes))[:3]
    advice = "; ".join(remedy.advice() for remedy in helpful)
    least = f"a step needs {plan.room()} that may be used ({gibibytes(device.memory_bytes)} of {device.name})"
    todo = "take a smaller model, a GPU with more memory, or shorter rows"
    return EnvironmentFault(f"nothing fits: {least}", spec.model.path, f"{todo}; lowest: {advice}" if advice else todo)

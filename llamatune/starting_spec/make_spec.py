"""``init``: a commented run spec for a model, rows and a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.starting_spec import InitOptions
from llamatune.errors import SpecError
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.host_memory import free_host_bytes
from llamatune.shapes.capabilities import OLDEST_WITH_BF16, Capability
from llamatune.shapes.known_gpus import known_gpu
from llamatune.spec_overrides import override, refuse_twice
from llamatune.starting_spec.choosing import Chosen, Device, choose
from llamatune.starting_spec.commented_yaml import commented_spec
from llamatune.starting_spec.row_lengths import preparing, row_lengths
from llamatune.units import gibibytes


@dataclass(frozen=True)
class StartingSpec:
    """The text of a spec, and what was chosen."""

    text: str
    prepare: str | None
    chosen: Chosen

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        chosen = self.chosen
        return {
            "spec": self.text,
            "settings": chosen.spec.model_dump(mode="json"),
            "reasons": chosen.reasons,
            "prepare": self.prepare,
            "max_seq_length": chosen.rows.max_seq_length,
            "rows": len(chosen.rows.lengths),
            "truncated_rows": chosen.rows.cut,
            "longest_row_tokens": chosen.rows.longest,
            "device": dataclasses.asdict(chosen.device),
            **chosen.plan.facts(),
        }


def make_spec(
    options: InitOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> StartingSpec:
    """Choose settings that fit, and write them with their reasons.

    Raises:
        SpecError: an option or override is wrong.
        DataError: the rows cannot be used. CheckpointError: the model or its tokenizer cannot.
        EnvironmentFault: nothing fits into the memory.
    """
    refuse_twice(options.overrides)
    _refuse_contradictions(options)
    config = read_config(options.model, on_event)
    device = _device(options, on_event)
    _refuse_other_device(options, device)
    rows = row_lengths(options.data, options.model, config, on_event, should_stop)
    output_dir = f"runs/{rows.directory.name}"
    chosen = choose(str(options.model), config, rows, device, output_dir, options.overrides)
    prepare = preparing(options.data, options.model, chosen.rows)
    return StartingSpec(commented_spec(chosen, prepare, options.output), prepare, chosen)


def _refuse_contradictions(options: InitOptions) -> None:
    """Raise where an override names another model or other rows than those that the spec is written for."""
    other = _overridden(options, "model", "path")
    if other is not None and Path(str(other)) != options.model:
        raise SpecError(f"model.path={other} is another model than --model", options.model, "give one of them alone")
    other = _overridden(options, "data", "train")
    (train,) = other if isinstance(other, list) and len(other) == 1 else (other,)
    if train is not None and Path(str(train)) != options.data:
        raise SpecError(f"data.train={other} is set by --data", options.data, "give that directory to --data")


def _refuse_other_device(options: InitOptions, device: Device) -> None:
    """Raise where an override has the run on another device than the one that it is planned for."""
    given = str(_overridden(options, "training", "device") or "auto")
    if given != "auto" and given.startswith("cuda") != bool(device.gpu):
        todo = "give --gpu cpu" if device.gpu else "name the GPU with --gpu"
        raise SpecError(f"training.device={given}, and the spec is planned for {device.name}", None, todo)


def _overridden(options: InitOptions, section: str, key: str) -> object:
    """What the overrides set a key to, as plain values have it; None: nothing."""
    values: dict[str, Any] = {}
    for text in options.overrides:
        override(values, text)
    inner = values.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


def _device(options: InitOptions, on_event: OnEvent) -> Device:
    if options.gpu == "cpu":
        return Device("a CPU", False, options.memory_bytes or free_host_bytes())
    if options.gpu is not None:
        known = known_gpu(options.gpu)
        memory = options.memory_bytes or known.memory_bytes
        if memory is None:
            raise SpecError("a compute capability says nothing of the memory", "--gpu", "add --memory, as 24GiB")
        return Device(_named(options.gpu, known.capability), known.capability, memory)
    from llamatune.devices import capability_of, find_device, memory_size_bytes

    device = find_device("auto", on_event)
    capability = capability_of(device)
    if capability is not None:
        return Device(
            _named("the GPU of this machine", capability), capability, options.memory_bytes or memory_size_bytes(device)
        )
    if options.memory_bytes is None:
        free = free_host_bytes()
        on_event(Notice(f"no GPU here: planned for the CPU and {gibibytes(free)} that are free; --gpu names another"))
        return Device("a CPU", False, free)
    assumed = f"planned for a GPU of compute capability {OLDEST_WITH_BF16[0]}.{OLDEST_WITH_BF16[1]}"
    on_event(Notice(f"no GPU here: {assumed}, which has bf16; --gpu names another, or cpu"))
    return Device(_named("a GPU", OLDEST_WITH_BF16), OLDEST_WITH_BF16, options.memory_bytes)


def _named(name: str, capability: Capability) -> str:
    return f"{name} (compute capability {capability[0]}.{capability[1]})"

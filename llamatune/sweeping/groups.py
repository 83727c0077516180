"""Which runs of a sweep can be trained together, on one base, and how many of them at once by the memory plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llamatune.events import ignore_event
from llamatune.memory.plan import placed, with_kernels
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.ranks import ALONE
from llamatune.spec import RunSpec
from llamatune.sweeping.members import Member
from llamatune.threads import threads_for, usable_cores
from llamatune.training.inputs import open_inputs
from llamatune.training.run_memory import choose_passes, choose_run_placement, plan_run_memory
from llamatune.training.schedule import pass_tokens
from llamatune.units import gibibytes

_MAY_DIFFER = {
    "training": {
        *("output_dir", "num_epochs", "max_steps", "optimizer", "learning_rate", "weight_decay", "lr_scheduler"),
        *("warmup_steps", "warmup_ratio", "min_learning_rate", "betas", "eps", "momentum", "nesterov"),
        *("max_grad_norm", "rank_timeout_s", "seed", "log_every_steps", "log_layer_grad_norms"),
        *("save_every_steps", "keep_last"),
    },
    "data": {"shuffle"},
}
"""What may differ in runs that are trained together; so may all of ``lora``, ``evaluation`` and ``tracking``."""

_WORKER_BYTES = 160 << 20
"""What Python and torch take in a worker process, pages of files that processes share apart, as measured."""


@dataclass(frozen=True)
class Room:
    """How many runs of a group are trained at once, on which device, and with how many threads.

    Several ``processes`` have the ``cores`` among them; one is this process, on any core. ``base_bytes`` are there once
    a process, ``own_bytes`` once for each run, as far as the plan of their heaviest step says.
    """

    at_once: int
    limit_bytes: int | None
    threads: int
    device: torch.device
    base_bytes: int = 0
    own_bytes: int = 0
    processes: int = 1
    cores: tuple[int, ...] = ()

    def told(self, count: int) -> str:
        """``together in 2 processes (about 2.1 GiB of 12.0 GiB)`` for so many runs."""
        processes = min(count, self.processes)
        held = processes * (self.base_bytes + _WORKER_BYTES) if processes > 1 else self.base_bytes
        needed = f"about {gibibytes(held + count * self.own_bytes)}"
        room = needed if self.limit_bytes is None else f"{needed} of {gibibytes(self.limit_bytes)}"
        return f"together {'on one base' if processes == 1 else f'in {processes} processes'} ({room})"


def groups(members: Sequence[Member]) -> list[list[Member]]:
    """The members that have a spec, those that can be trained together in one list, in the order of their first."""
    found: dict[str, list[Member]] = {}
    for member in members:
        if member.spec is not None:
            key = member.name if (why := why_alone(member.spec)) else _shared(member.spec)
            found.setdefault(json.dumps([why, key]), []).append(member)
    return list(found.values())


def why_alone(spec: RunSpec) -> str | None:
    """Why a run is trained alone; None: it need not be."""
    lora, training = spec.lora, spec.training
    if lora is None:
        return "it trains every parameter"
    reasons = {
        "training.fused: false": not training.fused,
        "training.learning_rate: auto": training.learning_rate == "auto",
        "training.compile: true": training.compile,
        "training.profile_steps": training.profile_steps is not None,
        "tracking.wandb": spec.tracking.wandb is not None,
        "lora.modules_to_save": bool(lora.modules_to_save),
        "model.placement": spec.model.placement in ("host", "shard"),
        # Its norms are of the matrix as it is held, and a shared one gives it in the dtype of products.
        "lora.kind: dora in 16 bits": lora.kind == "dora" and training.precision not in ("fp32", "tf32"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _shared(spec: RunSpec) -> str:
    """All that runs must have in common to be trained together."""
    values = spec.model_dump(mode="json", exclude={"lora", "evaluation", "tracking", "data", "training"})
    for section in ("data", "training"):
        values[section] = getattr(spec, section).model_dump(mode="json", exclude=_MAY_DIFFER[section])
    if spec.model.init == "random":  # the weights are drawn from it
        values["seed"] = spec.training.seed
    return json.dumps(values, sort_keys=True)


def room_for(group: Sequence[Member], force_base: bool, wanted: int | None = None) -> Room:
    """The room of a group: ``wanted`` at once, or as many as the memory plan allows.

    On a CPU there is a process for each core that this one may use, as far as the runs at once, and the memory that
    they leave for another base, allow that.
    """
    specs = [member.spec for member in group if member.spec is not None]
    inputs = open_inputs(specs[0], force_base, ignore_event)
    config, rows, device = inputs.config, inputs.prepared.train, inputs.device
    with chosen_kernels(specs[0].training.kernels, device) as kernels:
        planned = [with_kernels(spec, kernels) for spec in specs]
    rule = choose_passes(planned[0], config, rows, device, 1)
    threads = threads_for(config, pass_tokens(specs[0], rows, rule))
    if choose_run_placement(planned[0], config, rows, device, rule.tokens, ALONE).model.placement != "device":
        return Room(1, None, threads, device)
    plans = [plan_run_memory(placed(spec, "device"), config, rows, device, rule.tokens) for spec in planned]
    base, own = plans[0].step.weights, max(plan.step.peak - plan.step.weights for plan in plans)
    limit, most = plans[0].limit_bytes, min(len(group), wanted or len(group))
    fitting = most if limit is None or wanted else min(most, max(1, (limit - base) // own))
    cores = usable_cores() if device.type == "cpu" else []
    bases = fitting if limit is None else (limit - fitting * own) // (base + _WORKER_BYTES)
    processes = max(1, min(fitting, len(cores), bases))
    return Room(fitting, limit, threads, device, base, own, processes, tuple(cores))

"""Joint training of several runs on one base: ``train`` for each, in threads that take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from llamatune.errors import LlamatuneError
from llamatune.events import OnEvent, ShouldStop
from llamatune.formats.background_digests import SharedDigests
from llamatune.lockstep import Lockstep
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.model.shared_base import SharedBase
from llamatune.model.transformer import Transformer
from llamatune.spec import RunSpec
from llamatune.sweeping.groups import Room
from llamatune.sweeping.members import Member
from llamatune.threads import current_core, release_threads, stay_on, usable_cores, using_threads
from llamatune.tracking.trackers import Trackers
from llamatune.training.determinism import cublas_workspace, deterministic_kernels
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import load_own_base
from llamatune.training.precision import fp32_products
from llamatune.training.train import train

_LEAST_SHARED = 1 << 24
"""Elements of a matrix whose products are shared by runs that use several threads on several cores of a CPU.

These end with a turn and are started again in the next, which took about 3 ms on two cores.
"""

Outcome = dict[str, Any] | LlamatuneError
"""The summary of a run, or what ended it."""


def train_together(
    members: Sequence[Member],
    room: Room,
    force_base: bool,
    observer: Callable[[str], OnEvent],
    should_stop: ShouldStop,
    began_s: float | None = None,
    *,
    before_loading: Callable[[], None] | None = None,
) -> dict[str, Outcome]:
    """The outcome of each, by its name, of members of one group, trained at once; what ends one ends no other.

    ``observer`` gives what a member's events go to, by its name. ``began_s`` is that of ``train``. ``before_loading``
    is called once all know how they train within the free memory.
    """
    on_cpu = room.device.type == "cpu"
    several = on_cpu and room.threads > 1 and len(usable_cores()) != 1
    keep = _keep_and_release if several else torch.get_rng_state
    lockstep: Lockstep[dict[str, Any], LlamatuneError] = Lockstep(keep, torch.set_rng_state)
    shared = {
        "load_base": _LoadOnce(lockstep, before_loading, _LEAST_SHARED if several else 0),
        "digest": SharedDigests(),
    }
    core = current_core() if on_cpu and not several else None
    jobs = [
        partial(_train_in_turns, member, core, shared, force_base, observer, should_stop, began_s) for member in members
    ]
    spec = members[0].spec
    assert spec is not None
    # What the runs set for the whole process, each for itself, is set here: it is the same for all, and none undoes it.
    with (
        using_threads(room.threads),
        cublas_workspace(spec.training.deterministic),
        deterministic_kernels(spec.training.deterministic, room.device),
        fp32_products(spec.training.precision),
        chosen_kernels(spec.training.kernels, room.device),
    ):
        if several:
            release_threads()  # of this one, which waits
        outcomes = lockstep.run(jobs, LlamatuneError)
    names = [member.name for member in members]
    return dict(zip(names, outcomes, strict=True))


def train_alone(
    member: Member,
    force_base: bool,
    on_event: OnEvent,
    should_stop: ShouldStop,
    began_s: float | None = None,
    *,
    before_loading: Callable[[], None] | None = None,
) -> Outcome:
    """Train one run as ``llamatune train`` does; ``before_loading`` is as of ``train_together``."""

    def load(*given: Any) -> Transformer:
        assert before_loading is not None
        before_loading()
        return load_own_base(*given)

    shared = {} if before_loading is None else {"load_base": load}
    try:
        return _train(member, shared, force_base, on_event, should_stop, began_s)
    except LlamatuneError as fault:
        return fault


def _keep_and_release() -> torch.Tensor:
    """At the end of a turn, of a thread that uses several."""
    release_threads()
    return torch.get_rng_state()


def _train_in_turns(
    member: Member,
    core: int | None,
    shared: Mapping[str, Any],
    force_base: bool,
    observer: Callable[[str], OnEvent],
    should_stop: ShouldStop,
    began_s: float | None,
) -> dict[str, Any]:
    stay_on([] if core is None else [core])
    # A GPU's backward passes run in this thread, too: one thread of autograd for all would wait for itself.
    with torch.autograd.set_multithreading_enabled(False):
        return _train(member, shared, force_base, observer(member.name), should_stop, began_s)


def _train(
    member: Member,
    shared: Mapping[str, Any],
    force_base: bool,
    on_event: OnEvent,
    should_stop: ShouldStop,
    began_s: float | None,
) -> dict[str, Any]:
    assert member.spec is not None
    with Trackers(member.spec, on_event) as trackers:
        return train(
            member.spec,
            force_base=force_base,
            on_event=trackers.on_event,
            should_stop=should_stop,
            began_s=began_s,
            **shared,
        )


class _LoadOnce:
    """Loads the base for the first run that needs it, once all have claimed their directories and planned."""

    def __init__(
        self,
        lockstep: Lockstep[dict[str, Any], LlamatuneError],
        before_loading: Callable[[], None] | None,
        least_elements: int,
    ) -> None:
        self._lockstep, self._before_loading, self._least_elements = lockstep, before_loading, least_elements
        self._shared: SharedBase | None = None

    def __call__(self, spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop) -> Transformer:
        self._lockstep.wait()
        if self._shared is None:
            if self._before_loading is not None:
                self._before_loading()
            base = load_own_base(spec, inputs, on_event, should_stop)
            self._shared = SharedBase(base, self._lockstep, self._least_elements)
        return self._shared.model()

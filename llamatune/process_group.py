"""The process group of torch.distributed: connecting the ranks, their messages, and how all end when one fails."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from llamatune.errors import EnvironmentFault, FailedElsewhere, LlamatuneError, Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.launch_variables import Launch, read_launch
from llamatune.ranks import ALONE, Ranks
from llamatune.rendezvous import (
    FAILED,
    LEFT,
    failure,
    meet,
    open_store,
    refuse_after_failure,
    report_stop,
    within,
    without_gloos_log,
)

T = TypeVar("T")

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Releases of torch differ in its name."""
_NO_TIMEOUT = timedelta(days=365)
_HEARTBEAT_S = 2.0
_POLL_S = 0.01
_ANSWER_S = 5.0
_STOP = "stop"
_STOPPED = ("stopped while the ranks met", None, "run the same command again")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FAREWELL_S = 3.0
"""How long rank 0, whose process holds the store, waits for the others to read why it ends."""


class _Group(Ranks):
    """Several processes in a torch.distributed process group.

    Two groups are used. Collectives of tensors fail after ``timeout_s``: no rank computes that long between two. Waits,
    in which one rank may load or save for an hour, fail only when another rank shows no sign of life that long.
    """

    def __init__(self, launch: Launch, timeout_s: float, should_stop: ShouldStop) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.world_size, launch.local_rank
        self._timeout_s, self._leaving, self._should_stop = timeout_s, threading.Event(), should_stop
        self._store = open_store(launch, timeout_s, self._refuse_stop)
        self._control: dist.ProcessGroup | None = None
        self._unanswered = self._is_waiting = False

    def connect(self, launch: Launch, backend: str) -> None:
        """Wait until every rank has started, and open the process groups."""

        def open_groups() -> None:
            self._store.set(f"beat-{self.rank}", "0")  # asking for a key waits until it is there
            # A store of its own: gloo holds one connection for as long as it waits for another rank.
            store = open_store(launch, self._timeout_s, lambda: None, begin=False)
            timeout = timedelta(seconds=self._timeout_s)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)
            self._control = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)

        try:
            within(self._timeout_s + _ANSWER_S, lambda: meet(self._store, launch, self._timeout_s, self._refuse_end))
            with without_gloos_log():
                within(self._timeout_s + _ANSWER_S, open_groups, self._refuse_end)
        except RuntimeError as fault:
            chosen = [f"{name}={os.environ[name]}" for name in _INTERFACES if name in os.environ]
            by = f" by {' and '.join(chosen)}" if chosen else ""
            raise self._lost(f"the ranks cannot connect to each other{by}", fault) from fault
        threading.Thread(target=self._beat, daemon=True).start()

    def _refuse_stop(self) -> None:
        if self._should_stop():
            raise Stopped(*_STOPPED)

    def _refuse_end(self) -> None:
        self._refuse_stop()
        within(self._timeout_s, lambda: refuse_after_failure(self._store))

    def ask_to_stop(self) -> None:
        self._ask(lambda store: store.set(_STOP, "1"))

    # Sending

    def wait(self) -> None:
        self._poll(dist.barrier(self._control, async_op=True))

    def from_first(self, value: T) -> T:
        return self.gather(value if self.is_first else None)[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._poll(dist.all_gather(sizes, torch.tensor([len(content)]), self._control, async_op=True))
        longest = int(max(sizes))
        padded = torch.nn.functional.pad(content, (0, longest - len(content)))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._poll(dist.all_gather(parts, padded, self._control, async_op=True))
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        with self._collective():
            dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def all_gather_into(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        with self._collective():
            work = _all_gather_single(whole, part, async_op=True)

        def wait() -> None:
            with self._collective():
                work.wait()

        return wait

    def all_reduce(self, tensor: Tensor) -> None:
        with self._collective():
            dist.all_reduce(tensor)

    def all_to_all(self, tensors: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        counts, sent_counts = [shape.numel() for shape in shapes], [tensor.numel() for tensor in tensors]
        sent = torch.cat([tensor.reshape(-1) for tensor in tensors])
        tensors.clear()  # they are in ``sent``
        flat = sent.new_empty(sum(counts))
        with self._collective():
            dist.all_to_all_single(flat, sent, counts, sent_counts)
        parts = flat.split(counts)  # type: ignore[no-untyped-call]
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def exchanging(self) -> contextlib.AbstractContextManager[None]:
        return self._collective(computes=True)

    @contextlib.contextmanager
    def _collective(self, computes: bool = False) -> Iterator[None]:
        """Failures of messages become ``LlamatuneError``; of a block that also ``computes``, other faults pass."""
        try:
            yield
        except RuntimeError as fault:
            if computes and not isinstance(fault, dist.DistError) and "gloo" not in str(fault).lower():
                raise  # of memory, say
            raise self._lost("another rank ended, or did not answer in time", fault) from fault

    def _poll(self, work: dist.Work) -> None:
        """Wait for a collective of the control group while every rank shows signs of life."""
        with self._collective():
            beats, looked = dict.fromkeys(range(self.size), (b"", time.monotonic())), time.monotonic()
            self._is_waiting = True
            while not work.is_completed():
                time.sleep(_POLL_S)
                now = time.monotonic()
                if now - looked < _HEARTBEAT_S:
                    continue
                looked = now
                found = within(self._timeout_s, self._signs_of_life)
                for rank, (before, since) in beats.items():
                    beats[rank] = (before, since) if found[rank] == before else (found[rank], now)
                    if now - beats[rank][1] > self._timeout_s:
                        raise RuntimeError(f"rank {rank} shows no sign of life")
            self._is_waiting = False
            work.wait()

    def _signs_of_life(self) -> list[bytes]:
        """By rank; each changes at least every two seconds."""
        refuse_after_failure(self._store)
        return [self._store.get(f"beat-{rank}") for rank in range(self.size)]

    def _beat(self) -> None:
        """Show a sign of life every two seconds, whatever the main thread does."""
        count, asked = 0, False
        with contextlib.suppress(RuntimeError):  # the store ended with rank 0
            while not self._leaving.wait(_HEARTBEAT_S):
                count += 1
                self._store.set(f"beat-{self.rank}", str(count))
                if self.is_first and not asked and self._store.check([_STOP]):
                    asked = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    # Leaving

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """The store's answer; None if there is none in time: rank 0, which holds the store, has ended or stopped.

        Then it is asked no more, or each question would take that time again.
        """
        if self._unanswered:
            return None
        try:
            return within(_ANSWER_S, lambda: question(self._store))
        except RuntimeError:
            self._unanswered = True
            return None

    def _lost(self, what: str, fault: RuntimeError) -> LlamatuneError:
        """Why a collective failed: the fault that another rank has reported, or that a rank has vanished."""
        deadline = time.monotonic() + _HEARTBEAT_S
        while (reported := self._ask(lambda store: store.check([FAILED]))) is False and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # a rank that fails says so before it closes its connections
        if reported:
            return FailedElsewhere(failure(self._store)[1])
        if reported is None and self.rank > 1:  # without the store, rank 1 alone reports it
            return FailedElsewhere(EnvironmentFault.exit_code)
        first_line = str(fault).splitlines()[0]
        detail = re.sub(r"\[/?\w[^]]*\.\w+:\d+\] ", "", first_line).split(". ")[0]  # without source files
        return EnvironmentFault(
            f"rank {self.rank} of {self.size}: {what} ({detail})",
            None,
            "see the logs of the other ranks and nodes; the same command goes on from the last checkpoint",
        )

    def leave(self, fault: BaseException | None) -> BaseException | None:
        """Close the connections; the fault to raise: ``fault``, or ``FailedElsewhere`` if another rank was first."""
        self._leaving.set()
        if fault is not None and not isinstance(fault, FailedElsewhere):
            mine = f"{self.rank} {_exit_code(fault)}"
            self._ask(lambda store: store.compare_set(FAILED, "", mine))
            first, code = self._ask(failure) or (self.rank, 0)
            if first != self.rank:
                fault = FailedElsewhere(code)
        if self._is_waiting:  # for a rank that is stopped, say: freeing the group would wait, also as the process ends
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._control))
        self._control = None  # or its connections stay open, and the others wait on
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        left, deadline = self._ask(lambda store: store.add(LEFT, 1)), time.monotonic() + _FAREWELL_S
        while self.is_first and left is not None and left < self.size and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            left = self._ask(lambda store: store.add(LEFT, 0))
        return fault


def _exit_code(fault: BaseException) -> int:
    """The code with which the command line leaves. Exceptions of other libraries may carry theirs as well."""
    other = EnvironmentFault.exit_code if isinstance(fault, OSError | MemoryError) else LlamatuneError.exit_code
    return int(getattr(fault, "exit_code", other))


@contextlib.contextmanager
def connected(
    device_type: str, timeout_s: float, launch: Launch | None = None, should_stop: ShouldStop = never_stop
) -> Iterator[Ranks]:
    """Connect the ranks of this launch for the length of the block, and let them end together.

    A fault of one rank ends all of them with its exit code; that rank reports it, and the others raise
    ``FailedElsewhere``. Ranks leave the block only when all have reached its end.

    Raises:
        EnvironmentFault: the ranks do not find each other, or one vanished.
        Stopped: ``should_stop`` asked for it before they had met.
    """
    launch = read_launch() if launch is None else launch
    if launch.world_size == 1:
        yield ALONE
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        ranks = _Group(launch, timeout_s, should_stop)
    except LlamatuneError as fault:
        if fault.exit_code != Stopped.exit_code or (told := report_stop(launch, _FAREWELL_S)) is None:
            raise
        raise (Stopped(*_STOPPED) if told else FailedElsewhere(Stopped.exit_code)) from fault
    try:
        ranks.connect(launch, "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
        yield ranks
        ranks.wait()
    except BaseException as fault:
        raised = ranks.leave(fault)
        assert raised is not None
        if raised is fault:
            raise
        raise raised from fault
    ranks.leave(None)

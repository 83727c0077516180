"""Worker processes of a sweep, one a core, each of which trains some of the runs; their messages and their ends."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError
from typing import Any

import torch

from llamatune.child_process import death_of, end_child, start_child
from llamatune.events import Event, OnEvent, Progress, ShouldStop, ignore_event
from llamatune.openmp_variables import THREAD_COUNTS, waiting_asleep
from llamatune.sweeping.groups import Room
from llamatune.sweeping.joint_training import Outcome, train_alone, train_together
from llamatune.sweeping.members import Member
from llamatune.threads import stay_on
from llamatune.training.run_file_names import SUMMARY

_POLL_S = 0.2


@dataclass(frozen=True)
class _Share:
    """What a worker is sent at its start."""

    members: Sequence[Member]
    room: Room
    cores: tuple[int, ...]
    force_base: bool
    began_s: float | None


@dataclass(frozen=True)
class _Happened:
    """An event of a run."""

    name: str
    event: Event


@dataclass(frozen=True)
class _Planned:
    """All runs of a share know what they do within the memory that is free; the base is to be loaded next."""


@dataclass(frozen=True)
class _Load:
    """All shares are planned: the worker is to go on."""


@dataclass(frozen=True)
class _Warned:
    """A warning of a library: the arguments of ``warnings.warn_explicit``."""

    arguments: tuple[str, type[Warning], str, int]


def train_in_workers(
    members: Sequence[Member],
    room: Room,
    force_base: bool,
    observer: Callable[[str], OnEvent],
    should_stop: ShouldStop,
    began_s: float | None = None,
) -> dict[str, Outcome]:
    """The outcome of each, as of ``train_together``, of members that are dealt to the processes of the room.

    A run whose process died has an ``EnvironmentFault``; the others are trained to their ends.

    Raises:
        EnvironmentFault: a process cannot be started.
        Exception: what a worker raised that is no fault of a user; it ends all of them.
    """
    count = min(len(members), room.processes)
    shares = [
        _Share(members[place::count], room, room.cores[place::count], force_base, began_s) for place in range(count)
    ]
    found, asked = dict[str, Outcome](), False
    seen: dict[str | tuple[str, type[Warning], int], int] = {}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(_Worker(share))) for share in shares]
        first, running = workers[0], {worker.connection: worker for worker in workers}
        planning = set(running)
        while running:
            if not asked and should_stop():
                asked = True
                for worker in running.values():
                    worker.send(None)
            for connection in wait(list(running), _POLL_S):
                assert isinstance(connection, Connection)
                worker = running[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    message = worker.outcomes_of_death()
                match message:
                    case _Happened(_, Progress()) if worker is not first:
                        pass  # each reads the same base
                    case _Happened(name, event):
                        observer(name)(event)
                    case _Warned(arguments):  # shown once, though each worker may have it
                        warnings.warn_explicit(*arguments, registry=seen)
                    case _Planned():
                        _planned(connection, planning, running.values())
                    case dict():
                        found |= message
                        del running[connection]
                        _planned(connection, planning, running.values())
                    case Exception():
                        raise message
    return {member.name: found[member.name] for member in members}


def _planned(connection: Connection, planning: set[Connection], running: Iterable[_Worker]) -> None:
    """Let all load their bases if the worker of ``connection`` was the last that had not planned."""
    if connection in planning:
        planning.remove(connection)
        if not planning:
            for worker in running:
                worker.send(_Load())


class _Worker:
    def __init__(self, share: _Share) -> None:
        self._share = share
        few = share.room.threads > len(share.cores)
        self._child, self.connection = start_child(__name__, environment=waiting_asleep(os.environ) if few else None)
        self.send(share)

    def close(self) -> None:
        end_child(self._child, self.connection)

    def send(self, message: _Share | _Load | None) -> None:
        with contextlib.suppress(OSError):  # it died, which the next look at its pipe finds
            self.connection.send(message)

    def outcomes_of_death(self) -> dict[str, Outcome]:
        """The summaries of runs that had been finished, and a fault for each other one."""
        share = self._share
        todo = "run the same command again to continue, with a lower --at-once if memory ran out"
        return {
            member.name: train_alone(member, share.force_base, ignore_event, lambda: True, share.began_s)
            if (member.path / SUMMARY).is_file()
            else death_of(self._child, todo, member.path)
            for member in share.members
        }


def serve(descriptor: int) -> None:
    """The main function of a worker: receive a share, train it, and send what happens, at last the outcomes."""
    connection = Connection(descriptor)
    try:
        share: _Share = connection.recv()
    except (EOFError, OSError):
        return
    send, stop, go_on = _Sender(connection), threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(connection, stop, go_on), daemon=True).start()

    def before_loading() -> None:
        send(_Planned())
        go_on.wait()

    try:
        with _warnings_sent(send):
            send(_train(share, send, stop.is_set, before_loading))
    except Exception as fault:
        fault.add_note(f"In a worker process of a sweep:\n{traceback.format_exc()}")
        try:
            send(copy.copy(fault))  # not every exception can be made again of its arguments
        except Exception:
            bug = RuntimeError(f"{type(fault).__name__}: {fault}")
            bug.add_note(fault.__notes__[-1])
            send(bug)


class _Sender:
    """Sends a message at a time; ends the process where the main process is gone, as if both had been killed.

    A message that a thread has while it is sending another, as a warning of the garbage collector, follows that one.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self._sending = connection, threading.Lock(), 0
        self._later: list[bytes] = []

    def __call__(self, message: object) -> None:
        data = bytes(ForkingPickler.dumps(message))
        if self._sending == threading.get_ident():
            self._later.append(data)
            return
        with self._lock:
            self._sending = threading.get_ident()
            try:
                self._connection.send_bytes(data)
                while self._later:
                    self._connection.send_bytes(self._later.pop(0))
            except OSError:
                os._exit(1)
            finally:
                self._sending = 0


def _listen(connection: Connection, stop: threading.Event, go_on: threading.Event) -> None:
    """Set the events that a message asks for; end the process at once when the main process closes the pipe."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(1)
        if message is None:
            stop.set()
        go_on.set()  # a run that is to stop does not wait


@contextlib.contextmanager
def _warnings_sent(send: _Sender) -> Iterator[None]:
    """Within the block warnings of libraries go to the main process, which has them all."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        for kind in (category, UserWarning):  # a class within a function cannot be sent
            with contextlib.suppress(PicklingError, AttributeError, TypeError):
                send(_Warned((str(message), kind, filename, lineno)))
                return

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _train(
    share: _Share, send: _Sender, should_stop: ShouldStop, before_loading: Callable[[], None]
) -> dict[str, Outcome]:
    def observer(name: str) -> OnEvent:
        return lambda event: send(_Happened(name, event))

    # Also a number that the caller has set in its own process is one that is chosen.
    os.environ[THREAD_COUNTS[0]] = str(share.room.threads)
    torch.set_num_threads(share.room.threads)
    if len(share.members) > 1 or share.room.threads > 1:
        stay_on(share.cores)
    if len(share.members) > 1:
        how = share.force_base, observer, should_stop, share.began_s
        return train_together(share.members, share.room, *how, before_loading=before_loading)
    member = share.members[0]
    alone = train_alone(
        member, share.force_base, observer(member.name), should_stop, share.began_s, before_loading=before_loading
    )
    return {member.name: alone}

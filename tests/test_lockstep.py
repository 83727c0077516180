"""Jobs in lockstep: one runs at a time, like requests are answered together, and a fault ends what it should."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llamatune.lockstep import Lockstep


class Recorded:
    """Answers requests with their doubles, and keeps what was asked together."""

    def __init__(self, lockstep: Lockstep[Any, ValueError]) -> None:
        self.lockstep = lockstep
        self.groups: list[tuple[str, list[int]]] = []

    def ask(self, key: str, value: int, place: int = 0) -> int:
        def answers(requests: list[int]) -> list[int]:
            self.groups.append((key, requests))
            return [2 * request for request in requests]

        answer: int = self.lockstep.ask(key, place, value, answers)
        return answer


def test_like_requests_are_answered_together_in_the_order_of_the_jobs() -> None:
    lockstep: Lockstep[list[int], ValueError] = Lockstep()
    asked = Recorded(lockstep)

    def job(number: int) -> Callable[[], list[int]]:
        return lambda: [asked.ask(key, 10 * number + place) for place, key in enumerate("abc")]

    assert lockstep.run([job(number) for number in range(3)], ValueError) == [
        [2 * (10 * number + place) for place in range(3)] for number in range(3)
    ]
    assert asked.groups == [(key, [place, 10 + place, 20 + place]) for place, key in enumerate("abc")]


def test_one_job_runs_at_a_time_and_what_they_share_is_carried_for_each() -> None:
    state, running = random.Random(0), threading.Lock()
    lockstep: Lockstep[list[float], ValueError] = Lockstep(state.getstate, state.setstate)

    def job(number: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            drawn = []
            state.seed(number)
            for place in range(20):
                assert running.acquire(blocking=False)
                drawn.append(state.random())
                running.release()
                if place % (number + 1) == 0:
                    lockstep.ask("same", 0, None, lambda requests: requests)
                if place % 7 == 0:
                    lockstep.wait()
            return drawn

        return run

    def alone(number: int) -> list[float]:
        chance = random.Random(number)
        return [chance.random() for _ in range(20)]

    assert lockstep.run([job(number) for number in range(4)], ValueError) == [alone(number) for number in range(4)]


def test_who_is_behind_catches_up_and_all_meet_again_where_they_wait() -> None:
    lockstep: Lockstep[None, ValueError] = Lockstep()
    asked = Recorded(lockstep)

    def job(places: list[int]) -> Callable[[], None]:
        def run() -> None:
            for place in places:
                asked.ask(str(place), place, place)
            lockstep.wait()
            asked.ask("9", 9, 9)

        return run

    lockstep.run([job([1, 2, 2, 3]), job([1, 3]), job([2, 3])], ValueError)
    assert asked.groups == [
        ("1", [1, 1]), ("2", [2, 2]), ("2", [2]), ("3", [3, 3, 3]), ("9", [9, 9, 9]),
    ]  # fmt: skip


def test_an_expected_fault_ends_one_job_and_the_others_go_on() -> None:
    lockstep: Lockstep[int, ValueError] = Lockstep()
    asked = Recorded(lockstep)

    def fails() -> int:
        asked.ask("a", 1)
        raise ValueError("over")

    def goes_on() -> int:
        return asked.ask("a", 2) + asked.ask("b", 3)

    failed, done = lockstep.run([fails, goes_on], ValueError)
    assert (str(failed), done) == ("over", 10)
    assert asked.groups == [("a", [1, 2]), ("b", [3])]


def test_a_fault_of_shared_work_is_one_of_all_who_asked() -> None:
    lockstep: Lockstep[None, ValueError] = Lockstep()

    def fail(requests: list[int]) -> list[int]:
        raise ValueError(f"for {len(requests)}")

    outcomes = lockstep.run([lambda: lockstep.ask("a", 0, 1, fail)] * 3, ValueError)
    assert [str(outcome) for outcome in outcomes] == ["for 3"] * 3


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_any_other_fault_ends_all_jobs_and_their_blocks_are_left(kind: type[BaseException]) -> None:
    lockstep: Lockstep[None, ValueError] = Lockstep()
    left, threads = [], threading.active_count()

    def fails() -> None:
        lockstep.wait()
        raise kind("a bug")

    def waits() -> None:
        try:
            while True:
                lockstep.ask("a", 0, None, lambda requests: requests)
        finally:
            left.append(1)

    def never_begins() -> None:
        lockstep.wait()
        lockstep.wait()

    with pytest.raises(kind):
        lockstep.run([waits, fails, never_begins][1:], ValueError)
    with pytest.raises(kind):
        lockstep.run([_asking_once(lockstep, left), fails], ValueError)
    assert left == [1]
    assert threading.active_count() == threads


def _asking_once(lockstep: Lockstep[None, ValueError], left: list[int]) -> Callable[[], None]:
    def run() -> None:
        try:
            lockstep.wait()
            for _ in range(3):
                lockstep.ask("a", 0, None, lambda requests: requests)
                lockstep.wait()
        finally:
            left.append(1)

    return run


def test_a_job_alone_asks_and_waits_for_nobody() -> None:
    lockstep: Lockstep[int, ValueError] = Lockstep()

    def job() -> int:
        lockstep.wait()
        answer: int = lockstep.ask("a", 0, 4, lambda requests: [request + 1 for request in requests])
        return answer

    assert lockstep.run([job], ValueError) == [5]
    assert lockstep.run([], ValueError) == []

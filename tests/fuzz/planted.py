"""The fuzzer over a verb with planted faults, one a mutation: each must be found. Its options are those of fuzz.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import mutations

from llamatune import verification
from llamatune.errors import CheckpointError


def _raises() -> None:
    raise KeyError("planted")


def _says_two_lines() -> None:
    sys.stderr.write("error: one\n")
    raise CheckpointError("two")


def _grows() -> None:
    held = bytearray(3 << 30)
    del held


def _opens(path: str) -> Callable[[], None]:
    return lambda: os.close(os.open(path, os.O_RDONLY))


def _prints(text: str) -> Callable[[], None]:
    return lambda: sys.stdout.write(text) and None


def _writes_outside() -> None:
    with open("/etc/planted", "w"):
        pass


FAULTS: dict[str, Callable[[], None]] = {
    "traceback: commands/verify.py verify (KeyError)": _raises,
    "not one line of an error": _says_two_lines,
    "more than 2 GiB of verify": _grows,
    "the process died (SIGSEGV) of verify": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "no end within 2 s of verify": lambda: time.sleep(60),
    "opened outside": _opens("/etc/hosts"),
    "written outside": _writes_outside,
    "a control character on stdout": _prints("\x1b[2J"),
    "exit code 75 of verify": lambda: sys.exit(75),
    "left behind": lambda: os.mkdir(".llamatune-tmp-x") or _raises(),  # type: ignore[func-returns-value]
}
_number = 0


def _mutation(file: str, kind: str, content: bytes, number: int, seed: int) -> mutations.Mutation:
    global _number
    _number = number
    return mutations.Mutation(mutations.put_bytes("planted", content), False)


def _verify(path: Path, *more: object) -> verification.Verified:
    [*FAULTS.values()][_number % len(FAULTS)]()
    return verification.Verified(str(path), "prepared", "content", 0, 0)


if __name__ == "__main__":
    fuzz.LONGEST_VERB_S = 2.0
    fuzz.mutation = _mutation
    verification.verify = _verify  # type: ignore[assignment]
    sys.argv += ["--only", "prepared/llamatune.json", "--verb", "0", "--mutations", str(len(FAULTS))]
    sys.exit(fuzz.main())

"""Regular expressions of an adapter's configuration, matched against names of modules within a bounded time. No torch.

They come from a file that could be hostile, and Python's matcher can take exponential time. What is more than a plain
name is therefore matched in a child process, which is ended when its time is over.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from llamatune.errors import EnvironmentFault
from llamatune.strict_json import JsonFields

_LONGEST, _MOST = 4096, 4096
"""Characters of one pattern, and patterns under one key: unsloth's have a few hundred, EVA writes one a matrix."""
_SECONDS = 10
_HARMLESS = re.compile(r"(?:[\w.|-]|\\\.)*", re.ASCII)
"""Names, dots and alternatives at the top: a match of such a pattern cannot take long."""
_CHILD = """
import json, re, resource, sys
allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
size = 1 << 30 if allowed == resource.RLIM_INFINITY else min(1 << 30, allowed)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
print("ready", flush=True)
patterns, whole, names = json.load(sys.stdin)
matchers = [getattr(re.compile(pattern), "fullmatch" if whole else "match") for pattern in patterns]
print(json.dumps([[match(name) is not None for name in names] for match in matchers]))
"""


def matches(
    fields: JsonFields, key: str, patterns: Sequence[str], names: Sequence[str], frame: str | None = None
) -> list[list[bool]]:
    """Of each pattern under ``key``, which names it matches: as a whole, or from their beginning within ``frame``.

    Raises:
        CheckpointError: too many patterns, one that is no regular expression or too long, or they take too long.
    """
    if len(patterns) > _MOST or any(len(pattern) > _LONGEST for pattern in patterns):
        fields.refuse(key, f"at most {_MOST:,} patterns of at most {_LONGEST:,} characters are read")
    framed = [pattern if frame is None else frame.replace("{}", pattern) for pattern in patterns]
    if all(map(_HARMLESS.fullmatch, patterns)):
        matchers = [getattr(re.compile(pattern), "match" if frame else "fullmatch") for pattern in framed]
        return [[match(name) is not None for name in names] for match in matchers]
    question = json.dumps([framed, frame is None, list(names)]).encode()
    try:
        command = [sys.executable, "-I", "-S", "-c", _CHILD]
        child = subprocess.run(command, input=question, capture_output=True, timeout=_SECONDS, check=False)
    except OSError as fault:
        what = f"cannot start a process to match {key}: {fault.strerror}"
        raise EnvironmentFault(what, fields.path) from None
    except subprocess.TimeoutExpired:
        fields.refuse(key, f"to match it takes more than {_SECONDS} s; list the modules instead")
    if not child.stdout.startswith(b"ready"):
        raise EnvironmentFault(f"a process to match {key} did not start", fields.path, "is there memory left?")
    if child.returncode != 0:
        fields.refuse(key, "it holds no regular expression that can be matched; list the modules instead")
    return json.loads(child.stdout.partition(b"\n")[2])  # type: ignore[no-any-return]

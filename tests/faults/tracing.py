"""What a run did to a directory, as the kernel saw it, and how to make any one of those calls fail."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CHANGING = (
    "open,openat,creat,write,pwrite64,writev,pwritev,sendfile,copy_file_range,fsync,fdatasync,sync_file_range,msync,"
    "rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,truncate,ftruncate,fallocate,chmod,fchmod,fchmodat,"
    "link,linkat,symlink,symlinkat,mknod,mknodat,utimensat"
)
"""Every system call that can change a file or a name, or make one durable (opens are sorted by their flags)."""
FAULTS = ("kill", "ENOSPC", "EIO", "EDQUOT")

_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
_OPENS = ("open", "openat")
_BY_DESCRIPTOR = ("write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "ftruncate", "fallocate", "fchmod")


@dataclass(frozen=True)
class Call:
    """The ``number``-th call of ``name`` in its process, from 1."""

    name: str
    number: int
    text: str


def record_options() -> list[str]:
    return ["-y", "-e", f"trace={CHANGING}", "-e", "signal=none"]


def fault_options(call: Call, fault: str) -> list[str]:
    """strace's options that let ``call`` fail, or let SIGKILL come just before it is made."""
    what = "signal=SIGKILL" if fault == "kill" else f"error={fault}"
    return [*record_options(), "-e", f"inject={call.name}:{what}:when={call.number}"]


def touches(name: str, arguments: str, directory: Path) -> bool:
    """Whether a call changes something below ``directory``; what is merely written *about* it does not count."""
    if name in _OPENS and not re.search(r"\bO_(CREAT|WRONLY|RDWR|TRUNC)\b", arguments):
        return False
    if name in _BY_DESCRIPTOR:
        arguments = arguments.split(">", 1)[0]
    return f'"{directory}/' in arguments or f"<{directory}/" in arguments or f"<{directory}>" in arguments


def changing_calls(log: Path, directory: Path) -> list[Call]:
    """The calls of a recorded run that change what lies below ``directory``, in their order."""
    seen: Counter[tuple[str, str]] = Counter()
    found, makers = [], set()
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        process, name, arguments = match.groups()
        seen[process, name] += 1
        if touches(name, arguments, directory):
            makers.add(process)
            found.append(Call(name, seen[process, name], line))
    assert len(makers) <= 1, "more than one thread writes: calls cannot be numbered"
    return found


def injected(log: Path) -> list[str]:
    """The calls that strace let fail; of one that it wrote in two lines, as another thread made a call, both in one."""
    begun: dict[str, str] = {}
    found = []
    for line in log.read_text(errors="replace").splitlines():
        thread = line.partition(" ")[0]
        if "<unfinished ...>" in line:
            begun[thread] = line
        elif "(INJECTED)" in line:
            found.append(begun.get(thread, "") + line if " resumed>" in line else line)
    return found

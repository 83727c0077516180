"""What a disk may hold after the power was cut, worked out from the system calls of a recorded run.

POSIX promises little: the bytes of a file are there after an fsync of the file, a name after an fsync of its directory,
and of anything else any part may be there or not (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
A run is recorded call by call. For each moment, and for several fates of all that was not yet synced, ``states`` gives
the tree that would be found afterwards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tracing import CHANGING

NAMES = ("all", "none", "last", "every second")
"""Which of the unsynced changes of names survive."""
DATA = ("all", "lost", "zeroed", "cut")
"""What becomes of unsynced bytes: there, as before the write, zeros in a file of full size, or the first half."""

Tree = dict[str, bytes | None]
"""Files with their bytes, and directories (None), by path."""

_LINE = re.compile(r"(\w+)\((.*)\) += (-?\d+)")
_UNFINISHED, _RESUMED = "<unfinished ...>", re.compile(r"<\.\.\. \w+ resumed>(.*)")
_ROOT = 0


@dataclass(frozen=True)
class Names:
    """One atomic change of names: in directory ``d``, ``name`` becomes inode ``i`` (None: nothing)."""

    entries: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Data:
    """Bytes written at an offset, or (None) a file cut to that length."""

    inode: int
    offset: int
    content: bytes | None


@dataclass(frozen=True)
class Sync:
    inode: int


@dataclass(frozen=True)
class Said:
    """What the run told its user by then."""

    text: str


Operation = Names | Data | Sync | Said


def _only_reads(call: str) -> bool:
    """Whether a call neither changes a file nor says anything: it may come at any moment of another thread's."""
    name = call.strip().partition("(")[0]
    return name in ("close", "lseek") or (name == "openat" and re.search(r"\bO_(CREAT|WRONLY|RDWR)\b", call) is None)


def recording_options() -> list[str]:
    return ["-xx", "-s", str(64 << 20), "-e", f"trace={CHANGING},close,lseek", "-e", "signal=none"]


@dataclass
class _Open:
    inode: int
    position: int = 0
    appends: bool = False


@dataclass
class Recording:
    """The operations of one run below ``place``, which held ``before`` when it began."""

    place: Path
    before: Tree
    operations: list[Operation] = field(default_factory=list)
    directories: set[int] = field(default_factory=lambda: {_ROOT})

    def __post_init__(self) -> None:
        self._open: dict[int, _Open | str] = {}
        self._sizes: dict[int, int] = {}
        self._names: dict[int, dict[str, int]] = {_ROOT: {}}
        for path, content in sorted(self.before.items()):
            directory, name = self._locate(self._absolute(path))
            self._make(directory, name, content is None)
            if content is not None:
                self._data(self._names[directory][name], 0, content)
        self.operations += [Sync(inode) for inode in range(len(self._sizes) + 1)]
        self.began = len(self.operations)

    def read(self, log: Path) -> None:
        """Take in strace's log."""
        begun: dict[str, str] = {}  # by thread, while calls of another come between
        for line in log.read_text().splitlines():
            thread, _, call = line.partition(" ")
            if call.endswith(_UNFINISHED):
                begun[thread] = call.removesuffix(_UNFINISHED).strip()
                continue
            if resumed := _RESUMED.match(call.strip()):
                call = f"{begun.pop(thread)}{resumed[1]}"
            match = _LINE.match(call.strip())
            if match is None:
                continue
            name, arguments, result = match[1], match[2], int(match[3])
            at_once = not _only_reads(call) and any(not _only_reads(other) for other in begun.values())
            assert not at_once, "two threads at once: the order of what they did is not known"
            if result >= 0:
                strings = [bytes.fromhex(text.replace("\\x", "")) for text in re.findall(r'"([^"]*)"', arguments)]
                plain = [part.strip() for part in re.sub(r'"[^"]*"', "", arguments).split(",")]
                self._take(name, strings, plain, result)

    def _take(self, name: str, strings: list[bytes], plain: list[str], result: int) -> None:
        descriptor = int(plain[0]) if plain[0].isdigit() else -1
        if name == "openat":
            self._opened(strings[0].decode(), plain, result)
        elif name == "close":
            self._open.pop(descriptor, None)
        elif name in ("mkdir", "rmdir", "unlink", "rename", "link"):
            self._rename(name, [self._locate(text.decode()) for text in strings], "")
        elif name in ("unlinkat", "renameat2", "renameat"):
            at = [plain[0], plain[2]] if name != "unlinkat" else [plain[0]]
            found = [self._locate(text.decode(), base) for text, base in zip(strings, at, strict=True)]
            self._rename(name, found, plain[-1])
        elif descriptor in (1, 2) and name == "write":
            if descriptor == 1 or b" saved step=" in strings[0]:  # what the user may rely on
                self.operations.append(Said(strings[0].decode(errors="replace")))
        elif name == "copy_file_range":
            self._copied(plain, result)
        elif isinstance(opened := self._open.get(descriptor), _Open):
            self._on_file(name, opened, strings, plain, result)
        else:
            assert name in ("write", "fsync", "lseek"), f"{name} of something unknown"  # pipes, other directories

    def _copied(self, plain: list[str], count: int) -> None:
        """Bytes that the kernel copied from a file elsewhere, which is as it was."""
        source, into = self._open[int(plain[0])], self._open[int(plain[2])]
        assert isinstance(source, str)
        assert isinstance(into, _Open)
        begin, offset = (int(plain[place].split("]")[0].strip("[")) for place in (1, 3))
        with Path(source).open("rb") as file:
            file.seek(begin)
            self._data(into.inode, offset, file.read(count))

    def _on_file(self, name: str, opened: _Open, strings: list[bytes], plain: list[str], result: int) -> None:
        if name == "write":
            offset = self._sizes[opened.inode] if opened.appends else opened.position
            self._data(opened.inode, offset, strings[0][:result])
            opened.position = offset + result
        elif name == "pwrite64":
            self._data(opened.inode, int(plain[3]), strings[0][:result])
        elif name == "ftruncate":
            self._data(opened.inode, int(plain[1]), None)
        elif name in ("fsync", "fdatasync"):
            self.operations.append(Sync(opened.inode))
        elif name == "lseek":
            opened.position = result
        else:
            raise AssertionError(f"{name} is not understood")

    def _opened(self, path: str, plain: list[str], descriptor: int) -> None:
        found = self._locate(path, plain[0])
        if found is None:
            self._open[descriptor] = path  # elsewhere; a directory may still be the base of relative paths
            return
        directory, name = found
        inode = self._names[directory].get(name) if name else directory
        if inode is None:
            assert "O_CREAT" in plain[2]
            inode = self._make(directory, name, False)
        elif "O_TRUNC" in plain[2] and self._sizes.get(inode):
            self._data(inode, 0, None)
        self._open[descriptor] = _Open(inode, 0, "O_APPEND" in plain[2])

    def _rename(self, name: str, found: list[tuple[int, str] | None], flags: str) -> None:
        if None in found:
            assert found == [None] * len(found), "a name crossed the border of the place"
            return
        (directory, old), *rest = [each for each in found if each is not None]
        if name == "mkdir":
            self._make(directory, old, True)
        elif not rest:
            self._change((directory, old, None))
        else:
            (other, new), moved = rest[0], self._names[directory][old]
            if name == "link":
                self._change((other, new, moved))
                return
            left = self._names[other][new] if "EXCHANGE" in flags else None
            self._change((directory, old, left), (other, new, moved))

    def _make(self, directory: int, name: str, is_directory: bool) -> int:
        inode = len(self._sizes) + 1
        self._sizes[inode] = 0
        if is_directory:
            self.directories.add(inode)
            self._names[inode] = {}
        self._change((directory, name, inode))
        return inode

    def _change(self, *entries: tuple[int, str, int | None]) -> None:
        for directory, name, inode in entries:
            if inode is None:
                del self._names[directory][name]
            else:
                self._names[directory][name] = inode
        self.operations.append(Names(entries))

    def _data(self, inode: int, offset: int, content: bytes | None) -> None:
        end = offset + len(content or b"")
        self._sizes[inode] = end if content is None else max(self._sizes[inode], end)
        self.operations.append(Data(inode, offset, content))

    def _absolute(self, relative: str) -> str:
        return f"{self.place}/{relative}"

    def _locate(self, path: str, base: str = "AT_FDCWD") -> tuple[int, str] | None:
        """The directory and the name of a path ("" for the place itself), or None if it lies elsewhere."""
        if not path.startswith("/") and base.isdigit():
            opened = self._open[int(base)]
            return (opened.inode, path) if isinstance(opened, _Open) else None
        if path != str(self.place) and not path.startswith(f"{self.place}/"):
            return None
        *parents, name = path.removeprefix(str(self.place)).strip("/").split("/")
        inode = _ROOT
        for parent in parents:
            inode = self._names[inode][parent]
        return inode, name

    def after(self, moment: int, names: str, data: str) -> Tree:
        """What is there if the power goes after so many operations; one of ``NAMES`` and one of ``DATA``."""
        done = self.operations[:moment]
        synced: dict[int, int] = {}
        for place, operation in enumerate(done):
            if isinstance(operation, Sync):
                synced[operation.inode] = place
        loose = [
            place
            for place, operation in enumerate(done)
            if isinstance(operation, Names) and any(synced.get(d, -1) < place for d, _, _ in operation.entries)
        ]
        kept = {"all": loose, "none": [], "last": loose[-1:], "every second": loose[::2]}[names]
        dropped = set(loose) - set(kept)
        entries: dict[int, dict[str, int]] = {inode: {} for inode in self.directories}
        contents: dict[int, bytearray] = {}
        for place, operation in enumerate(done):
            if isinstance(operation, Names) and place not in dropped:
                for directory, name, inode in operation.entries:
                    if inode is None:
                        entries[directory].pop(name, None)
                    else:
                        entries[directory][name] = inode
            elif isinstance(operation, Data):
                is_durable = synced.get(operation.inode, -1) > place
                _write(contents.setdefault(operation.inode, bytearray()), operation, "all" if is_durable else data)
        tree: Tree = {}

        def walk(directory: int, prefix: str) -> None:
            for name, inode in entries[directory].items():
                if inode in self.directories:
                    tree[prefix + name] = None
                    walk(inode, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = bytes(contents.get(inode, b""))

        walk(_ROOT, "")
        return tree


def states(recording: Recording) -> Iterator[tuple[str, Tree, str]]:
    """Each tree that may be found, once: which it is in words, the tree, and what the user had been told by then."""
    seen: set[bytes] = set()
    operations = recording.operations
    for moment in range(recording.began, len(operations) + 1):
        said = "".join(operation.text for operation in operations[:moment] if isinstance(operation, Said))
        for names in NAMES:
            for data in DATA:
                tree = recording.after(moment, names, data)
                mark = _digest(tree, said)
                if mark not in seen:
                    seen.add(mark)
                    yield f"after {moment} operations, names {names}, data {data}", tree, said


def _write(held: bytearray, operation: Data, fate: str) -> None:
    content = operation.content
    if fate == "lost":
        return
    if content is None:
        if fate != "cut":
            del held[operation.offset :]
        return
    if fate == "zeroed":
        content = bytes(len(content))
    if fate == "cut":
        content = content[: len(content) // 2]
    held.extend(bytes(max(0, operation.offset - len(held))))
    held[operation.offset : operation.offset + len(content)] = content


def _digest(tree: Tree, said: str) -> bytes:
    digest = hashlib.sha256(said.encode())
    for path, content in sorted(tree.items()):
        shown = b"lock" if path.endswith(".lock") else b"directory" if content is None else content
        digest.update(f"\0{path}\0{len(shown)}\0".encode() + shown)
    return digest.digest()


def snapshot(place: Path) -> Tree:
    return {
        str(path.relative_to(place)): None if path.is_dir() else path.read_bytes() for path in sorted(place.rglob("*"))
    }


def restore(tree: Tree, place: Path) -> None:
    """Make a tree; a name whose directory is gone is not there."""
    place.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(content)

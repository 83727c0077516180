"""One verb on damaged files, run in this process under limits, and what of its outcome breaks the contract."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzed_files import Fuzzed, Verb
from mutations import BAIT, Mutation, redigest

import llamatune
from llamatune.cli import main
from llamatune.strict_json import parse_json

_PACKAGE = Path(llamatune.__file__).parent
_LARGEST_GROWTH = 2 << 30
_LARGEST_FILE = 256 << 20
_LEFTOVERS = (".llamatune-tmp-", ".trash-")
_READABLE = tuple(
    os.path.realpath(path)
    for path in (sys.prefix, sys.base_prefix, _PACKAGE.parent, "/proc", "/sys", "/etc/localtime", "/usr", "/lib",
                 "/dev/null", "/dev/urandom", "/etc/mime.types", "/etc/fonts", "/etc/os-release")
)  # fmt: skip
_BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_TIME = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d )?"
_LINE = re.compile(_TIME + r"((warning|note|notice|info): .*|[a-z_]+=.*|(\w+) [a-z_]+=.*|(held|eval|saved|skipped) .*)")
"""What a verb says on stderr beside its error: ``events`` as ``key=value`` lines, with the time of day."""


@dataclass
class Outcome:
    """How a verb ended, and the faults: each a kind, by which they are counted, and what was seen."""

    code: int
    faults: list[tuple[str, str]] = field(default_factory=list)


class Workplace:
    """A copy of the materials in which one file is damaged. The current directory is the copy.

    What nobody changes is linked to the materials. The audit hook, which stays, holds the process to the directory.
    """

    def __init__(self, materials: Path, directory: Path, names: tuple[str, ...]) -> None:
        self._materials, self._place = materials, directory / "case"
        self._names = names
        self._place.mkdir(parents=True)
        (directory / Path(BAIT).name).write_text('{"secret": 1}')
        os.chdir(self._place)
        self._roots = (os.path.realpath(self._place), os.path.realpath(materials))
        self._watching, self._seen = False, list[tuple[str, str]]()
        self._may_name_files = False
        self._kept = directory / "kept"
        tempfile.tempdir = str(self._place)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(self._audit)

    def damage(self, file: Fuzzed, mutation: Mutation) -> None:
        """Fill the directory, with the mutation in it."""
        for entry in os.scandir(self._place):
            _remove(Path(entry.path))
        for name in self._names:
            os.symlink(self._materials / name, name)
        path = Path(file.path)
        self._own(path.parts[0])
        _remove(path)
        mutation.put.write(path)
        os.chdir(self._place)
        self._linked = os.path.realpath(path) if path.is_symlink() else ""
        product = next((parent for parent in path.parents if (parent / "llamatune.json").is_file()), None)
        if mutation.redigested and mutation.put.content is not None and product and path.name != "llamatune.json":
            redigest(product, path.relative_to(product).as_posix(), mutation.put.content)
        self._may_name_files = file.is_spec
        shutil.rmtree(self._kept, ignore_errors=True)
        self._kept.mkdir()
        self._owned = path.parts[0]
        _copy(Path(self._owned), self._kept / self._owned)

    def _own(self, name: str) -> None:
        """A copy in the place of the link."""
        _remove(Path(name))
        if (self._materials / name).exists():
            _copy(self._materials / name, Path(name))

    def run(self, verb: Verb, as_json: bool, accepts: bool = False) -> Outcome:
        """Run the verb, and put back what it writes. ``accepts``: that it refuses its files is a fault."""
        for name in verb.writes:
            if name != self._owned:
                self._own(name)
        words = [*verb.words, "--json"] if as_json else [*verb.words]
        self._seen.clear()
        with _streams(verb.stdin) as said:
            outcome = self._call(words)
        faults = [*outcome.faults, *self._seen, *_spoken(outcome.code, verb, as_json, *said)]
        if accepts and outcome.code:
            faults.append((f"sound files are refused by {' '.join(verb.words)}", _end_of(said[1])))
        faults += [("left behind", name) for name in _leftovers(verb) if outcome.code]
        if outcome.code == 0 and "out.html" in verb.writes:
            faults += _characters(Path("out.html").read_text(encoding="utf-8", errors="replace"), "the page")
        for name in verb.writes:
            _remove(Path(name))
            if name == self._owned:
                _copy(self._kept / name, Path(name))
            elif name in self._names:
                os.symlink(self._materials / name, name)
        return Outcome(outcome.code, faults)

    def _call(self, words: list[str]) -> Outcome:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _LARGEST_GROWTH, most))
        self._watching = True
        try:
            main(words)
        except SystemExit as end:
            return Outcome(int(end.code or 0))
        except BaseException as fault:
            return Outcome(1, [(f"traceback: {_last_own_frame(fault)}", _last_line(fault))])
        finally:
            self._watching = False
        raise AssertionError("main always exits")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)):
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                self._check(os.fsdecode(path), writes)
        elif event in _CHANGING:
            for path in arguments[: _CHANGING[event]]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._check(os.fsdecode(path), True)
        elif event in ("socket.connect", "socket.bind", "os.system", "os.exec"):
            self._seen.append((f"{event}", ascii(arguments)[:200]))
        elif event == "subprocess.Popen" and arguments[0] != sys.executable:
            self._seen.append(("another program is run", ascii(arguments[0])))

    def _check(self, path: str, writes: bool) -> None:
        if "\0" in path:
            return
        self._watching = False
        try:
            place = os.path.realpath(path)
        finally:
            self._watching = True
        inside = _is_below(place, self._roots[:1] if writes else self._roots)
        if writes and not inside and place not in (os.devnull, self._linked):
            if not self._may_name_files:
                self._seen.append(("written outside", ascii(path)))
            raise PermissionError(13, "Permission denied", path)
        is_bait = Path(place).name == Path(BAIT).name
        known = inside or _is_below(place, _READABLE) or place == self._linked  # links are legal
        if not self._may_name_files and (is_bait or not known):
            self._seen.append(("opened outside", ascii(path)))


_CHANGING = {"os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1}
"""Events and how many of their arguments are paths. Removals go through descriptors of directories, opened before."""


def _is_below(place: str, roots: tuple[str, ...]) -> bool:
    return any(place == root or place.startswith(f"{root}/") for root in roots)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _copy(source: Path, target: Path) -> None:
    """Files, links and special files as they are."""
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
    elif source.is_dir():
        target.mkdir()
        for entry in os.scandir(source):
            _copy(Path(entry.path), target / entry.name)
    elif source.is_file():
        shutil.copyfile(source, target)
    elif source.is_fifo():
        os.mkfifo(target)
    elif source.exists():
        os.link(source, target)


@contextlib.contextmanager
def _streams(stdin: bytes) -> Iterator[list[bytes]]:
    """Standard streams of their own; the list gets what was written to stdout and stderr."""
    said: list[bytes] = []
    kept = [os.dup(number) for number in range(3)]
    made = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    os.write(made[0], stdin)
    os.lseek(made[0], 0, os.SEEK_SET)
    for number, descriptor in enumerate(made):
        os.dup2(descriptor, number)
    objects = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    try:
        yield said
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = objects
        for descriptor in made[1:]:
            said.append(os.pread(descriptor, 16 << 20, 0))
        for number, descriptor in enumerate(kept):
            os.dup2(descriptor, number)
        for descriptor in (*kept, *made):
            os.close(descriptor)


def _spoken(code: int, verb: Verb, as_json: bool, stdout: bytes, stderr: bytes) -> Iterator[tuple[str, str]]:
    """What of the exit code and of the two streams breaks the contract."""
    if code not in verb.exit_codes and code != 1:
        yield f"exit code {code} of {verb.name}", _end_of(stderr)
    texts = []
    for name, content in (("stdout", stdout), ("stderr", stderr)):
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as fault:
            yield f"{name} is not UTF-8", str(fault)
            texts.append(content.decode(errors="replace"))
        yield from _characters(texts[-1], name)
    lines = texts[1].split("\n")[:-1]
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback (most recent" in texts[1]:
        yield "a traceback on stderr", _end_of(stderr)
    elif code > 1 and (errors != lines[-1:] or texts[1][-1:] != "\n"):
        yield "not one line of an error", _end_of(stderr)
    elif code == 0 and errors:
        yield "an error and exit code 0", errors[0][:300]
    for line in lines:
        if not _LINE.fullmatch(line) and line not in errors and code != 1:
            yield f"a stray line on stderr: {line[:40]!a}", line[:300]
            break
    if code > 1 and "out of memory" in texts[1]:
        yield f"more than 2 GiB of {verb.name}", _end_of(stderr)
    if as_json and code > 1 and stdout:
        yield "stdout is not empty", ascii(stdout[:200])
    if as_json and code == 0:
        try:
            value = None if verb.name == "chat" else parse_json(stdout)
        except ValueError as fault:
            yield f"stdout of {verb.name} is not strict JSON", str(fault)
        else:
            if verb.name != "chat" and not isinstance(value, dict):
                yield "stdout is not a JSON object", ascii(stdout[:200])


def _characters(text: str, where: str) -> Iterator[tuple[str, str]]:
    for place, character in enumerate(text):
        if character.isprintable() or character in "\n\t ":
            continue
        category = unicodedata.category(character)
        if category in ("Cc", "Zl", "Zp", "Cs") or unicodedata.bidirectional(character) in _BIDIRECTIONAL:
            yield f"a control character on {where}", f"{character!a} in {text[max(0, place - 60) : place + 40]!a}"
            return


def _end_of(stderr: bytes) -> str:
    return ascii(stderr.decode(errors="replace")[-300:])


def _last_own_frame(fault: BaseException) -> str:
    """``data/batches.py batch (IndexError)``: where in the package it was, whatever library it came from."""
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__) if str(_PACKAGE) in frame.filename]
    where = f"{Path(frames[-1].filename).relative_to(_PACKAGE)} {frames[-1].name}" if frames else "?"
    return f"{where} ({type(fault).__name__})"


def _last_line(fault: BaseException) -> str:
    frames = traceback.extract_tb(fault.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {str(fault)[:200]!a}"


def _leftovers(verb: Verb) -> list[str]:
    places = [Path(), *(Path(name) for name in verb.writes if os.path.isdir(name))]
    return [entry.name for place in places for entry in os.scandir(place) if entry.name.startswith(_LEFTOVERS)]


_EMPTY_PICTURE = '<svg viewBox="0 0 1 1"><defs></defs></svg>'


def without_pictures() -> Callable[[bool], None]:
    """A switch of matplotlib's renderer, which would take nine tenths of the time of ``report``."""
    from matplotlib.figure import Figure

    drawn = Figure.savefig

    def save(figure: Figure, file: Any, **settings: Any) -> None:
        file.write(_EMPTY_PICTURE if settings["format"] == "svg" and isinstance(file, io.StringIO) else b"picture")

    def switch(draws: bool) -> None:
        Figure.savefig = drawn if draws else save  # type: ignore[method-assign]

    return switch


def measured(sound: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """In the place of a benchmark's child process: the result of a sound cell."""
    return lambda task, directory, should_stop: json.loads(json.dumps(sound))

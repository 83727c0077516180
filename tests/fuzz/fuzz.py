"""Fuzzer of every file that a verb reads: ``python tests/fuzz/fuzz.py``, or ``make test-fuzz``.

Mutations of a file are read by its verbs of ``fuzzed_files.py`` in turn, in processes that are forked from this one,
which has imported everything. Mutations are numbered, and are functions of the seed: ``--only FILE --number N`` repeats
one. A fault is tried again by itself in a new process before it counts. The exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import pkgutil
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
from fuzz_child import Outcome, Workplace, measured, without_pictures  # noqa: E402
from fuzzed_files import NOT_READ, TWINS, Fuzzed, fuzzed_files  # noqa: E402
from materials import build_materials  # noqa: E402
from mutations import Mutation, mutation, put_bytes  # noqa: E402

import llamatune  # noqa: E402

LONGEST_VERB_S = 20.0
"""On a machine that is free; where more processes want to run than there are cores, as many times longer."""
_BATCH = 20
_DRAWN_ONE_IN = 8
"""Mutations for one of which charts are drawn into pictures."""
_SHOWN = 3
"""Cases of one kind of fault that are told of."""


@dataclass(frozen=True)
class Case:
    """One mutation of a file, and which of its verbs read it."""

    file: int
    number: int
    verbs: tuple[int, ...]


@dataclass
class Found:
    """A kind of fault: how often, and examples as (case, verb, what was seen)."""

    count: int = 0
    examples: list[tuple[Case, int, str]] = field(default_factory=list)


@dataclass
class Batch:
    """A process with its cases, and what it is doing now. ``proves``: a fault is tried again."""

    pid: int
    pipe: int
    cases: list[Case]
    proves: bool
    done: int = 0
    verb: int = 0
    since: float = 0.0
    buffer: bytes = b""


class Fuzzer:
    """Runs cases in ``processes`` processes at once, for no longer than ``seconds``."""

    def __init__(self, options: argparse.Namespace, files: Sequence[Fuzzed], materials: Path, scratch: Path) -> None:
        self._options, self._files, self._materials, self._scratch = options, files, materials, scratch
        self.mutations: Counter[int] = Counter()
        self.codes: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
        self.faults: dict[str, Found] = defaultdict(Found)
        self.unproved: Counter[str] = Counter()
        self._proofs: deque[Case] = deque()
        self._running: dict[int, Batch] = {}
        self._cell = json.loads(next((materials / "bench" / "cells").iterdir()).read_bytes())
        del self._cell["values"]
        self._ends = time.monotonic() + options.seconds

    def run(self, cases: Iterator[Case]) -> None:
        exhausted = False
        while True:
            while len(self._running) < self._options.processes and not (exhausted and not self._proofs):
                if self._proofs:
                    self._start([self._proofs.popleft()], proves=True)
                    continue
                batch = [] if time.monotonic() > self._ends else list(itertools.islice(cases, _BATCH))
                if exhausted := not batch:
                    break
                self._start(batch, proves=False)
            if not self._running:
                return
            ready, _, _ = select.select(list(self._running), [], [], 1.0)
            for pipe in ready:
                self._read(self._running[pipe])
            longest_s = LONGEST_VERB_S * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
            for batch in list(self._running.values()):
                if time.monotonic() - batch.since > longest_s:
                    os.kill(batch.pid, signal.SIGKILL)
                    self._read(batch, killed=True)

    def _start(self, cases: list[Case], proves: bool) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.close(reading)
                os.setpgid(0, 0)
                self._serve(cases, writing)
            os._exit(0)
        os.close(writing)
        self._running[reading] = Batch(pid, reading, cases, proves, since=time.monotonic())

    def _serve(self, cases: list[Case], pipe: int) -> None:
        """In the child: a line before each verb and one after it."""

        def tell(*values: Any) -> None:
            os.write(pipe, json.dumps(values).encode() + b"\n")

        place = Path(tempfile.mkdtemp(dir=self._scratch))
        from llamatune.benchmarking import cell_runs

        cell_runs.run_cell = measured(self._cell)
        draw = without_pictures()
        try:
            workplace = Workplace(self._materials, place, tuple(sorted(os.listdir(self._materials))))
            for case in cases:
                file = self._files[case.file]
                workplace.damage(file, self._made(case))
                draw(case.number % _DRAWN_ONE_IN == 0)
                if self._options.keep and len(cases) == 1 and not self._options.keep.exists():
                    shutil.copytree(Path.cwd(), self._options.keep, symlinks=True)
                for number in case.verbs:
                    tell(number)
                    outcome = workplace.run(file.verbs[number], _as_json(case.number, number), self._options.sound)
                    tell(number, outcome.code, outcome.faults)
                tell("case")
        except BaseException as fault:
            import traceback

            tell("harness", "".join(traceback.format_exception(fault))[-3000:])
        finally:
            os.chdir("/")
            shutil.rmtree(place, ignore_errors=True)

    def _made(self, case: Case) -> Mutation:
        file = self._files[case.file]
        sound = file.sound or (self._materials / file.path).read_bytes()
        if self._options.sound:
            return Mutation(put_bytes("sound", sound), False)
        return mutation(file.path, file.kind, sound, case.number, self._options.seed)

    def _read(self, batch: Batch, killed: bool = False) -> None:
        content = b"" if killed else os.read(batch.pipe, 1 << 20)
        batch.buffer += content
        *lines, batch.buffer = batch.buffer.split(b"\n")
        for line in lines:
            self._note(batch, json.loads(line))
        if content:
            return
        del self._running[batch.pipe]
        os.close(batch.pipe)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGKILL)  # processes that a verb has left
        _, status = os.waitpid(batch.pid, 0)
        if batch.done == len(batch.cases):
            return
        code, case = os.waitstatus_to_exitcode(status), batch.cases[batch.done]
        kind = f"no end within {LONGEST_VERB_S:.0f} s" if killed else f"the process died ({_ending(code)})"
        verb = self._files[case.file].verbs[batch.verb]
        self._end(batch, batch.verb, Outcome(code, [(f"{kind} of {verb.name}", "")]))
        later = tuple(number for number in case.verbs if number > batch.verb)
        rest = [Case(case.file, case.number, later), *batch.cases[batch.done + 1 :]]
        if not batch.proves:
            self._start(rest, proves=False)

    def _note(self, batch: Batch, told: list[Any]) -> None:
        batch.since = time.monotonic()
        match told:
            case ["harness", text]:
                raise AssertionError(f"{batch.cases[batch.done]}: {text}")
            case ["case"]:
                if not batch.proves:
                    self.mutations[batch.cases[batch.done].file] += 1
                batch.done += 1
            case [verb]:
                batch.verb = verb
            case [verb, code, faults]:
                self._end(batch, verb, Outcome(code, [(kind, seen) for kind, seen in faults]))

    def _end(self, batch: Batch, verb: int, outcome: Outcome) -> None:
        """Count an outcome, or a fault that came again."""
        case = batch.cases[batch.done]
        if not batch.proves:
            self.codes[case.file, self._files[case.file].verbs[verb].name][outcome.code] += 1
            again = [kind for kind, _ in outcome.faults if len(self.faults[kind].examples) < _SHOWN]
            for kind, _ in outcome.faults:
                if kind in again:
                    self.unproved[kind] += 1
                else:
                    self.faults[kind].count += 1
            if again:
                self._proofs.append(Case(case.file, case.number, (verb,)))
            return
        for kind, seen in outcome.faults:
            found = self.faults[kind]
            found.count += 1
            self.unproved[kind] -= 1
            if len(found.examples) < _SHOWN:
                found.examples.append((case, verb, seen))
            if found.count == 1:
                sys.stderr.write(f"{kind}: {self._files[case.file].path}, mutation {case.number}: {seen}\n")

    def table(self) -> Iterator[str]:
        """Files, verbs, mutations and exit codes."""
        for number, file in enumerate(self._files):
            if not self.mutations[number]:
                continue
            for name in dict.fromkeys(verb.name for verb in file.verbs):
                codes = self.codes.get((number, name), Counter())
                shown = "  ".join(f"{code}: {count:,}" for code, count in sorted(codes.items()))
                yield f"{file.path:58} {name:16} {self.mutations[number]:6,}  {shown}"

    def report(self) -> Iterator[str]:
        """Every kind of fault, with commands that repeat it."""
        for kind, found in sorted(self.faults.items(), key=lambda item: -item[1].count):
            if not found.count:
                continue
            yield f"\n{found.count:,} x {kind}"
            for case, verb, seen in found.examples:
                file = self._files[case.file]
                words = " ".join(file.verbs[verb].words)
                made = self._made(case)
                fitting = ", redigested" if made.redigested else ""
                yield f"    {words}{' --json' if _as_json(case.number, verb) else ''}"
                yield f"      {made.put.told[:160]}{fitting}: {seen}"
                yield f"      --only '{file.path}' --number {case.number} --verb {verb} --seed {self._options.seed}"
        for kind, count in self.unproved.items():
            if count > 0 and not self.faults[kind].examples:
                yield f"\n{count:,} x {kind}, which did not come again in a process of its own"


def _as_json(number: int, verb: int) -> bool:
    return (number + verb) % 2 == 0


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _cases(options: argparse.Namespace, files: Sequence[Fuzzed]) -> Iterator[Case]:
    """File by file in turns, so that a run that ends early has tried each as often."""
    chosen = [n for n, file in enumerate(files) if any(fnmatchcase(file.path, text) for text in options.only)]
    assert chosen, f"no such file; there are {', '.join(file.path for file in files)}"
    if options.sound:
        seen = set[tuple[tuple[str, ...], bytes | None]]()
        for file in chosen:
            keys = [(verb.words, files[file].sound) for verb in files[file].verbs]
            if new := tuple(number for number, key in enumerate(keys) if key not in seen):
                yield Case(file, 0, new)
            seen.update(keys)
        return
    numbers = range(options.first, options.first + options.mutations) if options.number is None else options.number
    for number in numbers:
        for file in chosen:
            verbs: tuple[int, ...] = tuple(range(len(files[file].verbs)))
            if options.verb is not None:
                verbs = (options.verb,)
            elif not options.every_verb:
                verbs = (number % len(verbs),)
            yield Case(file, number, verbs)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=3000, help="of each file")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no new mutations after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a file, or a pattern of files")
    parser.add_argument("--number", type=int, action="append", help="this mutation alone")
    parser.add_argument("--verb", type=int, help="this verb of the file's alone, by number")
    parser.add_argument("--every-verb", action="store_true", help="that reads a file reads each mutation, not in turn")
    parser.add_argument("--sound", action="store_true", help="no mutation: each command line once, which must accept")
    parser.add_argument("--materials", type=Path, help="where sound files are, or are made and stay")
    parser.add_argument("--keep", type=Path, help="with --number: a copy of the damaged directory")
    options = parser.parse_args()
    options.only = options.only or ["*"]
    return options


def _import_everything() -> None:
    for module in pkgutil.walk_packages(llamatune.__path__, "llamatune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("matplotlib.pyplot")


def _scratch() -> str:
    """In memory where there is room: the sweep syncs files by the hundred thousand."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return tempfile.mkdtemp(prefix="llamatune-fuzz-", dir=memory if roomy else None)


def main() -> int:
    options, began = _parse(), time.monotonic()
    options.keep = options.keep and options.keep.resolve()
    torch.set_num_threads(1)
    scratch = Path(os.path.realpath(_scratch()))
    try:
        materials = (options.materials or scratch / "materials").resolve()
        if not materials.exists():
            materials.mkdir(parents=True)
            os.chdir(materials)
            with _quiet(scratch / "log"):
                build_materials()
        os.chdir(materials)
        _import_everything()
        files = fuzzed_files()
        tried = NOT_READ | TWINS | {Path(file.path).name for file in files}
        untried = {path.name for path in Path().rglob("*") if path.is_file() and path.parent.name != "cells"} - tried
        assert not untried, f"nothing damages {', '.join(sorted(untried))}: tell fuzzed_files.py of them"
        os.chdir("/")
        gc.collect()
        gc.freeze()  # in a child, collections would go over all modules and copy their pages
        fuzzer = Fuzzer(options, files, materials, scratch)
        fuzzer.run(_cases(options, files))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for line in (*fuzzer.table(), *fuzzer.report()):
        sys.stdout.write(f"{line}\n")
    runs, faults = sum(sum(counts.values()) for counts in fuzzer.codes.values()), fuzzer.faults
    kinds = [kind for kind, found in faults.items() if found.count]
    sys.stdout.write(
        f"\n{sum(fuzzer.mutations.values()):,} mutations of {len(fuzzer.mutations)} files, {runs:,} runs of verbs, "
        f"{len(kinds)} kinds of faults, {time.monotonic() - began:.0f} s, seed {options.seed}\n"
    )
    return 1 if kinds else 0


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Standard streams into a file, which is shown if the block raises."""
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    except BaseException:
        os.write(kept[1], log.read_bytes())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())

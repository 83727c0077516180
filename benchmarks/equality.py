"""Whether two checkouts of llamatune give the same results, byte for byte: what a change of form alone must keep.

    python benchmarks/equality.py --before COMMIT --after DIR [--only NAME ...] [--keep DIR] [--jobs 2]

Both sides run the same commands on the tiny base of the demo, on the CPU and one thread, each with its own code.
Everything that they write and print as JSON is compared; equality_files.py says what little is left out. Not covered:
``training.compile`` (a minute a case), CUDA, trackers, reports, and what is written for people to read.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from equality_cases import CASES, Case, Interruption, with_needs, write_material
from equality_files import Compared, compare_folders

ROOT = Path(__file__).resolve().parents[1]


class CaseFailed(Exception):
    """A command did not end as it should have."""


@dataclass(frozen=True)
class Side:
    """One checkout and the folder that its commands run in; ``continues``: whose interrupted runs it goes on with."""

    name: str
    checkout: Path
    folder: Path
    continues: Path | None = None

    def check(self) -> None:
        """Refuse to compare a checkout that Python does not find: another llamatune would be run in its place."""
        command = [sys.executable, "-c", "import llamatune; print(llamatune.__file__)"]
        done = subprocess.run(command, cwd=self.folder, env=_environment(self.checkout), capture_output=True, text=True,
                              check=True)  # fmt: skip
        found = Path(done.stdout.strip()).resolve()
        if found != self.checkout / "llamatune" / "__init__.py":
            raise SystemExit(f"{self.name}: {self.checkout} is not what runs, but {found}")

    def run(self, case: Case) -> None:
        """Run the commands of a case; what each prints lies beside what it writes."""
        (self.folder / case.name).mkdir()
        for number, command in enumerate(case.commands, 1):
            if case.interruption is not None and self.continues is not None:
                self._interrupt(self.continues, command, case.interruption)
            done = subprocess.run(_python(command), cwd=self.folder, env=_environment(self.checkout),
                                  capture_output=True, check=False)  # fmt: skip
            if done.returncode:
                raise CaseFailed(f"{self.name}: exit {done.returncode}: {_last_line(done.stderr)}")
            (self.folder / case.name / f"stdout-{number}.json").write_bytes(done.stdout)

    def _interrupt(self, checkout: Path, command: Sequence[str], interruption: Interruption) -> None:
        process = subprocess.Popen(_python(command), cwd=self.folder, env=_environment(checkout),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        line = b""
        with process:
            assert process.stderr is not None
            for line in process.stderr:
                if re.search(rb"\bstep=%d/" % interruption.after_step, line):
                    process.send_signal(interruption.number)
        if process.returncode != interruption.exit_code:
            raise CaseFailed(f"{self.name}: not interrupted, but exit {process.returncode}: {_last_line(line)}")


def _python(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "llamatune", *command]


def _environment(checkout: Path) -> dict[str, str]:
    changes = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    return {**os.environ, **changes}


def _last_line(stderr: bytes) -> str:
    return (stderr.decode(errors="replace").strip().splitlines() or ["nothing on stderr"])[-1]


def find_checkout(given: str, scratch: Path, stack: contextlib.ExitStack) -> Path:
    """The directory that is named, or a worktree of the commit that is; the worktree goes when ``stack`` closes."""
    if Path(given).is_dir():
        checkout = Path(given).resolve()
    else:
        checkout = scratch
        git = ["git", "-C", str(ROOT), "worktree"]
        done = subprocess.run([*git, "add", "--quiet", "--detach", str(scratch), given], capture_output=True, text=True,
                              check=False)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{given}: no directory, and no commit: {done.stderr.strip()}")
        stack.callback(subprocess.run, [*git, "remove", "--force", str(scratch)], check=True)
    if not (checkout / "llamatune" / "__main__.py").is_file():
        raise SystemExit(f"{given}: no checkout of llamatune")
    return checkout


def compare_case(case: Case, sides: tuple[Side, Side], pool: ThreadPoolExecutor) -> Compared:
    """Run a case on both sides and compare what is there.

    Raises:
        CaseFailed: a command failed, or the case does not show what it is there for.
    """
    list(pool.map(lambda side: side.run(case), sides))
    before, after = (side.folder / case.name for side in sides)
    if case.shows is not None and not _shows(before, case.shows):
        raise CaseFailed(f"shows nothing: there is no {case.shows}")
    return compare_folders(before, after, (sides[0].folder, sides[1].folder), case.unstable)


def _shows(folder: Path, pattern: str) -> bool:
    return any(re.search(pattern, path.read_text()) for path in folder.rglob("*.json*"))


def compare_all(cases: Sequence[Case], sides: tuple[Side, Side], jobs: int) -> bool:
    """Print a row for each case as it is done; whether all are equal."""
    started, differing, files, size = time.monotonic(), 0, 0, 0
    _print_row("configuration", "compared", "result")
    _print_row("---", "---:", "---")
    with ThreadPoolExecutor(jobs) as pool:
        for case in cases:
            compared = Compared(0, 0, None)
            try:
                compared = compare_case(case, sides, pool)
                result = "equal" if compared.difference is None else f"DIFFERS: {compared.difference}"
            except CaseFailed as fault:
                result = f"FAILED: {fault}"
            differing += result != "equal"
            files, size = files + compared.files, size + compared.bytes
            _print_row(case.name, f"{compared.files:,} files, {compared.bytes:,} bytes", result)
    verdict = f"{differing} not equal" if differing else "all equal"
    seconds = time.monotonic() - started
    sys.stdout.write(f"\n{len(cases)} configurations, {files:,} files, {size:,} bytes, {seconds:.0f} s: {verdict}\n")
    return not differing


def _print_row(name: str, compared: str, result: str) -> None:
    sys.stdout.write(f"| {name:18} | {compared:>28} | {result} |\n")
    sys.stdout.flush()


def choose(patterns: Sequence[str] | None) -> list[Case]:
    """The cases whose names match, and those that they need; all without a pattern."""
    for pattern in patterns or ():
        if not fnmatch.filter(CASES, pattern):
            raise SystemExit(f"--only {pattern}: there is {', '.join(CASES)}")
    return with_needs(name for name in CASES if any(fnmatch.fnmatch(name, p) for p in patterns or ("*",)))


def main() -> None:
    """Exit 0 where nothing differs, 1 at any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="COMMIT|DIR", help="the code that is known to be right")
    parser.add_argument("--after", required=True, metavar="COMMIT|DIR", help="the code that is to do the same")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations; resume-* stands for several")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new directory for what both sides wrote")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="2: both sides at the same time")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep {options.keep}: it is there already")
    cases = choose(options.only)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # worktrees are removed then, too
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="equality-"))).resolve()
        output = scratch / "output" if options.keep is None else options.keep.resolve()
        before = find_checkout(options.before, scratch / "before", stack)
        after = find_checkout(options.after, scratch / "after", stack)
        sides = (Side("before", before, output / "before"), Side("after", after, output / "after", before))
        for side in sides:
            side.folder.mkdir(parents=True)
            write_material(side.folder / "material")
            side.check()
        equal = compare_all(cases, sides, options.jobs)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()

"""Builds sdist and wheel, installs the wheel as README's cluster does, and runs every verb where nothing else is.

Not collected by pytest: it downloads torch. ``make test-wheel`` runs it. It fails on the first line that a verb writes
to stderr and should not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from readme_job import ROOT, commands, make_workplace, other_commands, run_quietly

LARGEST_MATERIAL_BYTES = 8 << 20


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command to its end; its standard output."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def build(place: Path) -> tuple[Path, int]:
    """The wheel, and the bytes of the demo's material in it; the sdist is built beside it."""
    run(sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(ROOT), cwd=place)
    (wheel,) = (place / "dist").glob("*.whl")
    assert len(list((place / "dist").glob("*.tar.gz"))) == 1
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        material = sum(e.file_size for e in archive.infolist() if e.filename.startswith("llamatune/demo/"))
    assert "llamatune/py.typed" in names
    assert not [name for name in names if not name.startswith(("llamatune/", "llamatune-"))]
    assert material <= LARGEST_MATERIAL_BYTES, f"the demo's material is {material:,} bytes"
    return wheel, material


def install(wheel: Path, place: Path) -> Path:
    """The folder of programs of an environment with the wheel and what it needs, installed without an index."""
    for name in ("login", "compute"):
        venv.create(place / name, with_pip=True)
    pip = ("-m", "pip", "--disable-pip-version-check")
    constraints = ("-c", str(ROOT / "constraints.txt"))
    login, compute = (str(place / name / "bin" / "python") for name in ("login", "compute"))
    run(login, *pip, "download", "--quiet", *constraints, "--dest", "wheels", str(wheel), cwd=place)
    offline = ("--no-index", "--find-links", "wheels")
    run(compute, *pip, "install", "--quiet", *offline, str(wheel), cwd=place, PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    installed = run(compute, *pip, "list", "--format", "freeze", cwd=place).lower()
    for judge in ("transformers", "peft", "pytest"):
        assert judge not in installed
    return place / "compute" / "bin"


def main() -> None:
    """Fail with a traceback on the first thing that is not as it should be."""
    # As its user would: nothing of this environment leads to other packages, and nothing is said of threads.
    for name in [name for name in os.environ if name.startswith(("PYTHON", "VIRTUAL_ENV", "OMP_", "MKL_", "GOMP_"))]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        wheel, material = build(place)
        llamatune = str(install(wheel, place) / "llamatune")
        begun = time.monotonic()
        report = json.loads(run_quietly([llamatune, "demo", "--output", "demo", "--json"], place))
        seconds = time.monotonic() - begun
        assert report["base_exact_match"] < 10, report
        assert report["tuned_exact_match"] > 80, report
        make_workplace(place)
        for _, *arguments in [*commands(), *other_commands()]:
            run_quietly([llamatune, *arguments], place)
            run_quietly([llamatune, arguments[0], "--help"], place)
        sys.stdout.write(
            f"{wheel.name}: the demo in {seconds:.0f} s and every verb in an empty environment: exact match "
            f"{report['base_exact_match']:.1f} % -> {report['tuned_exact_match']:.1f} %, material {material:,} bytes\n"
        )


if __name__ == "__main__":
    main()

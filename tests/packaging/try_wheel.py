"""Builds sdist and wheel, installs the wheel in an empty environment, and runs the demo and README's job there.

Not collected by pytest: it installs torch anew. ``make test-wheel`` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from readme_job import ROOT, commands, make_workplace, run_quietly

LARGEST_MATERIAL_BYTES = 8 << 20


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command to its end; its standard output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    """Fail with a traceback on the first thing that is not as it should be."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run(sys.executable, "-m", "build", "--outdir", str(place / "dist"), str(ROOT), cwd=place)
        (wheel,) = (place / "dist").glob("*.whl")
        (sdist,) = (place / "dist").glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            material = sum(e.file_size for e in archive.infolist() if e.filename.startswith("llamatune/demo/"))
        assert "llamatune/py.typed" in names
        assert not [name for name in names if not name.startswith(("llamatune/", "llamatune-"))]
        assert material <= LARGEST_MATERIAL_BYTES, f"the demo's material is {material:,} bytes"
        venv.create(place / "empty", with_pip=True)
        python = place / "empty" / "bin" / "python"
        constraints = str(ROOT / "constraints.txt")
        install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints)
        run(*install, "torch", cwd=place)
        run(*install, str(wheel), cwd=place)
        installed = run(str(python), "-m", "pip", "list", "--format", "freeze", cwd=place).lower()
        assert "transformers" not in installed
        assert "peft" not in installed
        # As its user would: nothing of this environment leads to other packages.
        for name in [name for name in os.environ if name.startswith(("PYTHON", "VIRTUAL_ENV"))]:
            del os.environ[name]
        llamatune = str(place / "empty" / "bin" / "llamatune")
        report = json.loads(run_quietly([llamatune, "demo", "--output", "demo", "--json"], place))
        assert report["base_exact_match"] < 10, report
        assert report["tuned_exact_match"] > 80, report
        make_workplace(place)
        for _, *arguments in commands():
            run_quietly([llamatune, *arguments], place)
        sys.stdout.write(
            f"{wheel.name} and {sdist.name}: demo and README's job in an empty environment: exact match "
            f"{report['base_exact_match']:.1f} % -> {report['tuned_exact_match']:.1f} %, material {material:,} bytes\n"
        )


if __name__ == "__main__":
    main()

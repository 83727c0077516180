"""Builds sdist and wheel, installs the wheel in an empty environment, and runs the demo there.

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

ROOT = Path(__file__).parents[2]
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
        out = run(str(place / "empty" / "bin" / "llamatune"), "demo", "--output", "demo", "--json", cwd=place)
        report = json.loads(out)
        assert report["base_exact_match"] < 10, report
        assert report["tuned_exact_match"] > 80, report
        sys.stdout.write(
            f"{wheel.name} and {sdist.name}: demo in an empty environment: exact match "
            f"{report['base_exact_match']:.1f} % -> {report['tuned_exact_match']:.1f} %, material {material:,} bytes\n"
        )


if __name__ == "__main__":
    main()

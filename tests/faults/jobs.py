"""Commands whose outcome a fault must not change, and what their outcome is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_tools import outcome

OWN_LEFTOVERS = (".llamatune-tmp-", ".trash-")


def names_below(place: Path) -> list[str]:
    """Every file and directory, the lock apart (a finished product may lack it after a power loss)."""
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.name != ".llamatune.lock")


def leftovers(place: Path) -> list[str]:
    return [name for name in names_below(place) if Path(name).name.startswith(OWN_LEFTOVERS)]


@dataclass(frozen=True)
class Job:
    """One command line and what it makes below a place of its own.

    ``product`` tells all that must come out the same, or None where there is no finished product.
    ``whole_or_none``: also what stands there after a failure is whole, or nothing.
    """

    arguments: Callable[[Path], list[str]]
    product: Callable[[Path], Any]
    whole_or_none: bool
    loss_scale: float | None = None


def training(arguments: tuple[str, ...], loss_scale: float | None = None) -> Job:
    """Words of ``arguments`` may name the place as ``{place}``."""

    def product(place: Path) -> dict[str, Any] | None:
        run = place / "run"
        return outcome(run) if (run / "summary.json").exists() else None

    def line(place: Path) -> list[str]:
        return [*(word.replace("{place}", str(place)) for word in arguments), f"training.output_dir={place / 'run'}"]

    return Job(line, product, False, loss_scale)


def building(arguments: tuple[str, ...]) -> Job:
    """``merge-lora`` and ``prepare-data``: one directory that appears at once."""

    def product(place: Path) -> dict[str, str] | None:
        output = place / "out"
        if not output.exists():
            return None
        files = [path for path in output.rglob("*") if path.is_file()]
        return {str(path.relative_to(output)): hashlib.sha256(_comparable(path)).hexdigest() for path in files}

    return Job(lambda place: [*arguments, "--output", str(place / "out")], product, True)


def _comparable(path: Path) -> bytes:
    """The bytes of a file; of a manifest without the report, which names the output directory, and its own digest."""
    if path.name != "llamatune.json":
        return path.read_bytes()
    try:
        manifest = json.loads(path.read_bytes())
        manifest["facts"].pop("report", None)
        manifest.pop("sha256", None)
    except ValueError:
        return b"not JSON"
    return json.dumps(manifest).encode()

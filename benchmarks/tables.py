"""The table of ratios of a comparison, written to ``table.md`` and ``table.json`` after every row."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llamatune.processor import processor_name


class Table:
    """Rows of ours, theirs and the ratio, below command, commit, machine and versions."""

    def __init__(self, output: Path, command: str) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.rows, self.notes = output, [], []  # type: ignore[var-annotated]
        self.facts = {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}

    def note(self, line: str) -> None:
        """A line above the table."""
        self.notes.append(line)
        self.progress(line)
        self.write()

    def progress(self, line: str) -> None:
        """A line on stderr."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def row(self, name: str, ours: float, theirs: float | None, ratios: list[float], apart: float | None) -> None:
        """Add a row; ``ratios`` are of paired rounds (shown: median, range); ``apart`` is the losses' difference."""
        ratio = statistics.median(ratios) if ratios else None
        self.rows.append({"name": name, "llamatune": ours, "peer": theirs, "ratio": ratio, "ratios": ratios,
                          "largest_loss_difference": apart, "load": os.getloadavg()[0]})  # fmt: skip
        self.progress(f"{name}: {shown(ours)} {shown(theirs)} ratio {shown(ratio)}")
        self.write()

    def write(self) -> None:
        """Write all rows so far."""
        (self.output / "table.json").write_text(json.dumps({**self.facts, "notes": self.notes, "rows": self.rows}))
        (self.output / "table.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The facts, the notes and the table."""
        lines = [f"- {name}: {value}" for name, value in self.facts.items()] + [f"- {note}" for note in self.notes]
        lines += ["", "| | llamatune | peer | ratio | range of rounds | losses apart | load |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in self.rows:
            ratios = row["ratios"]
            span = f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else ""
            cells = [shown(row[key]) for key in ("llamatune", "peer", "ratio")]
            apart = row["largest_loss_difference"]
            cells += [span, "" if apart is None else f"{apart:.2g}", f"{row['load']:.1f}"]
            lines.append(f"| {' | '.join([row['name'], *cells])} |")
        return "\n".join(lines) + "\n"


def shown(number: float | None) -> str:
    """Four digits; empty for None."""
    return "" if number is None else f"{number:.4g}"


def commit() -> str:
    """The commit that is checked out, and whether files were changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "no repository"


def machine() -> str:
    """Processor, cores and threads, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def versions() -> dict[str, Any]:
    """Versions of the compared packages."""
    names = ("torch", "transformers", "peft", "accelerate")
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}

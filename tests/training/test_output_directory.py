"""Where a run and a benchmark may write: not over what they read, nor into what another command made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.errors import EnvironmentFault
from llamatune.spec import load_spec
from llamatune.training.run_directory import refuse_output
from llamatune.training.run_file_names import CELLS, METRICS
from llamatune.training.run_lock import LOCK

Command = Callable[..., Any]

SPEC = """
model: {path: work/base}
lora: {r: 2, alpha: 4, init_from: work/adapter}
data: {train: work/rows, validation: work/held-out}
training: {output_dir: run, num_epochs: 1, learning_rate: 0.1, device: cpu}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs that cannot be used: what is refused here is refused before they are opened."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SPEC)
    for name in ("base", "adapter", "rows", "held-out"):
        Path("work", name).mkdir(parents=True)
        Path("work", name, "file").write_text(name)
    Path("alias").symlink_to("work/rows")
    return tmp_path


def _tree(place: Path) -> list[str]:
    return sorted(str(path) for path in place.rglob("*"))


def _with_files(place: Path, output: str, names: list[str]) -> list[str]:
    """What stands in ``place`` after files of these names were made in the directory ``output``."""
    for name in names:
        path = place / output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return _tree(place)


@pytest.mark.parametrize(
    ("output", "more", "told"),
    [
        ("work/base", [], "would replace model.path"),
        ("work/rows", ["--overwrite"], "would replace data.train"),
        ("work/../work/held-out", [], "would replace data.validation"),
        ("work/adapter", [], "would replace lora.init_from"),
        ("alias", [], "would replace data.train"),
        ("alias/run", [], "is inside of data.train"),
        ("work/base/runs/1", ["--overwrite"], "is inside of model.path"),
        ("work", ["--overwrite"], "would replace model.path"),
        (".", ["--overwrite"], "would replace model.path"),
    ],
)
def test_a_run_may_not_write_over_what_it_reads(
    command: Command, place: Path, output: str, more: list[str], told: str
) -> None:
    before = _tree(place)
    for mode in ([], ["--dry-run"]) if more == [] else ([],):
        done = command("train", "run.yaml", f"training.output_dir={output}", *more, *mode)
        assert (done.code, f"error: training.output_dir {told}: " in done.stderr) == (2, True), done.stderr
    assert _tree(place) == before


@pytest.mark.parametrize("names", [["mine"], [LOCK, f"{CELLS}/1.json"], ["origin.json"], [METRICS]])
def test_a_directory_of_something_else_is_no_run(command: Command, place: Path, names: list[str]) -> None:
    """Also not that of a benchmark, or one that only looks like a run's."""
    before = _with_files(place, "run", names)
    for mode in ([], ["--dry-run"]):
        done = command("train", "run.yaml", *mode)
        assert (done.code, "the directory is not empty and is no run" in done.stderr) == (5, True), done.stderr
    assert _tree(place) == before


@pytest.mark.parametrize("names", [[f"{CELLS}/mine"], [LOCK, METRICS]])
def test_a_directory_of_something_else_is_no_benchmark(command: Command, place: Path, names: list[str]) -> None:
    before = _with_files(place, "out", names)
    done = command("benchmark", "run.yaml", "--output", "out")
    assert (done.code, "is not empty and holds something else" in done.stderr) == (5, True), done.stderr
    assert _tree(place) == before


def test_a_benchmark_may_not_write_over_what_it_reads(
    command: Command, small_base: Path, prepared: Callable[..., Path], place: Path
) -> None:
    os.rename(place / "run.yaml", place / "spec.yaml")
    words = [f"model.path={small_base}", f"data.train={prepared()}", "data.validation=null", "lora.init_from=null"]
    for output, told in ((small_base / "out", "is inside of model.path"), (prepared(), "holds something else")):
        done = command("benchmark", "spec.yaml", *words, "--grid", "training.seed=1,2", "--output", output)
        assert done.code in (2, 5)
        assert told in done.stderr
    done = command(
        "benchmark", "spec.yaml", *words, "--output", prepared().parent, "--overwrite", "--grid", "lora.r=2,4"
    )
    assert (done.code, "--output would replace data.train" in done.stderr) == (2, True), done.stderr


def test_a_name_that_the_locale_cannot_hold_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ascii_alone(name: str) -> bytes:
        return name.encode("ascii")

    spec = load_spec(Path("run.yaml"), ["training.output_dir=\u00e9"])
    monkeypatch.setattr("llamatune.training.run_directory.os.fsencode", ascii_alone)
    with pytest.raises(EnvironmentFault, match=r"set LC_ALL=C\.UTF-8"):
        refuse_output(spec, overwrite=False)

"""The specs in ``examples/specs``, with the memory that they are planned to take, and scripts in ``examples/slurm``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.checkpoints.config_json import write_config_json
from llamatune.shapes.presets import PRESETS
from llamatune.spec import load_spec
from llamatune.spec_schema import EDITOR_LINE, SCHEMA_FILE

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "examples" / "specs").glob("*.yaml"))
PLANNED = re.compile(
    r"# planned: (?P<peak>[\d.]+) GiB of the (?P<used>[\d.]+) GiB that are used of (?P<memory>\d+) GiB"
    r"(?:, on each of (?P<ranks>\d+) ranks)?, rows of (?P<tokens>\d+) tokens"
)
SCRIPTS = {
    "eight-gpus": ("70b-8x80gb.yaml", "--gpus-per-node", "8", "--cpus-per-task", "8"),
    "two-nodes": ("70b-8x40gb.yaml", "--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "8",
                  "--time", "12:00:00"),
    "array": ("7b-24gb.yaml", "7b-gsm8k-40gb.yaml", "--array"),
}  # fmt: skip
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``models/llama-2-7b`` and others, which hold a configuration alone."""
    place = tmp_path_factory.mktemp("examples")
    for size in ("7b", "13b", "70b"):
        path = place / "models" / f"llama-2-{size}"
        path.mkdir(parents=True)
        write_config_json(path, PRESETS[path.name], "bfloat16")
    return place


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_planned_memory_is_what_plan_memory_says_and_fits(
    path: Path, models: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    editor, _, planned, *_ = path.read_text(encoding="utf-8").splitlines()
    assert editor == EDITOR_LINE.format("../../llamatune/run_spec.schema.json")
    assert (path.parent / editor.partition("$schema=")[2]).resolve() == SCHEMA_FILE.resolve()
    said = PLANNED.fullmatch(planned)
    assert said is not None, planned
    memory, ranks, tokens = f"{said['memory']}GiB", said["ranks"] or 1, said["tokens"]
    ran = command("plan-memory", path, "--memory", memory, "--ranks", ranks, "--max-seq-length", tokens, "--json")
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["fits"]
    assert f"{found['predicted_peak_memory_bytes'] / 2**30:.1f}" == said["peak"]
    assert f"{found['memory_limit_bytes'] / 2**30:.1f}" == said["used"]


def test_names_say_what_the_specs_hold() -> None:
    """The model, the card's memory, and where the run goes."""
    assert len(SPECS) >= 12
    for path in SPECS:
        spec = load_spec(path)
        assert path.name.startswith(spec.model.path.removeprefix("models/llama-2-"))
        assert Path(spec.training.output_dir).name == path.stem
        has_bf16 = not {"v100", "t4"} & set(path.stem.split("-"))
        assert has_bf16 or "bf16" not in (spec.training.precision, spec.model.dtype)
        assert ("qlora" in path.stem) == (spec.model.dtype == "nf4")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_those_that_slurm_writes(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / "specs")
    script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    assert command("slurm", *SCRIPTS[name]).stdout == script.read_text(encoding="utf-8")
    assert {path.stem for path in script.parent.glob("*.sbatch")} == set(SCRIPTS)

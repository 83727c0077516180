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
MISFITS = re.compile(
    r"\| `(?P<dtype>\w+)` \| `(?P<placement>\w+)` \| (?P<ranks>\d+) of (?P<memory>\d+) GB "
    r"\| (?P<peak>[\d.]+) GiB \| (?P<used>[\d.]+) GiB \|"
)
README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
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
    spec = load_spec(path)
    assert spec.training.gradient_accumulation_steps >= int(ranks), "a rank has nothing to compute"
    assert (spec.model.placement == "shard") == (int(ranks) > 1)
    if spec.model.placement == "host":
        layers = PRESETS[Path(spec.model.path).name].num_hidden_layers
        # All blocks come in twice, but for the two of each pass that are there; torch pins powers of two.
        pinned = layers << (found["bytes_brought_per_pass"] // (2 * layers - 4) - 1).bit_length()
        assert f"{pinned >> 30} GiB of pinned host memory" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("said", list(MISFITS.finditer(README)), ids=lambda said: "-".join(said.groups()[:4]))
def test_what_does_not_fit_is_what_plan_memory_says(
    said: re.Match[str], models: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    changes = [f"model.dtype={said['dtype']}", f"model.placement={said['placement']}", "training.precision=bf16"]
    changes += ["training.micro_batch_size=1", "training.gradient_accumulation_steps=8"]
    options = ["--memory", f"{said['memory']}GiB", "--ranks", said["ranks"], "--max-seq-length", "512"]
    spec = ROOT / "examples" / "specs" / "70b-16gb-host-qlora.yaml"
    ran = command("plan-memory", spec, *changes, *options, "--json")
    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert not found["fits"]
    assert found["recomputed_layers"]["the whole block"] == 80
    assert f"{found['predicted_peak_memory_bytes'] / 2**30:.1f}" == said["peak"]
    assert f"{found['memory_limit_bytes'] / 2**30:.1f}" == said["used"]


def test_every_size_has_a_spec_for_every_memory_and_the_readme_lists_it() -> None:
    covered = {re.sub(r"^(\d+b)-.*?(\d+)gb.*$", r"\1 \2", path.stem) for path in SPECS}
    assert {f"{size} {memory}" for size in ("7b", "13b", "70b") for memory in (16, 24, 40, 80)} <= covered
    assert set(re.findall(r"\(specs/(.+?)\.yaml\)", README)) == {path.stem for path in SPECS}
    assert len(list(MISFITS.finditer(README))) >= 6


def test_names_say_what_the_specs_hold() -> None:
    """The model, the card's memory, and where the run goes."""
    for path in SPECS:
        spec = load_spec(path)
        assert path.name.startswith(spec.model.path.removeprefix("models/llama-2-"))
        assert Path(spec.training.output_dir).name == path.stem
        has_bf16 = not {"v100", "t4"} & set(path.stem.split("-"))
        assert has_bf16 or "bf16" not in (spec.training.precision, spec.model.dtype)
        assert ("qlora" in path.stem) == (spec.model.dtype == "nf4")
        assert spec.training.learning_rate is None, "the default is the rate that sweeps found"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_those_that_slurm_writes(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples" / "specs")
    script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    assert command("slurm", *SCRIPTS[name]).stdout == script.read_text(encoding="utf-8")
    assert {path.stem for path in script.parent.glob("*.sbatch")} == set(SCRIPTS)

"""``llamatune plan-memory``: what it predicts, from what, and that it needs no torch for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from step_tools import step_bytes

from llamatune import cli
from llamatune.data.batches import open_prepared
from llamatune.errors import DataError
from llamatune.formats.prepared import read_lengths
from llamatune.memory.plan import heaviest_rows, plan_memory
from llamatune.memory.sizes import Rows
from llamatune.shapes.presets import PRESETS
from llamatune.spec import build_spec, load_spec
from llamatune.training.train import plan_training

GIB = 1 << 30


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        with pytest.raises(SystemExit) as left:
            cli.main(["plan-memory", *arguments, "--json"])
        out = capsys.readouterr()
        assert left.value.code == code, out.err
        return json.loads(out.out) if code == 0 else {"error": out.err}

    return run


@pytest.fixture
def spec_file(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Path:
    values = {
        "model": {"path": str(tiny_base()), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": str(prepared())},
        "training": {"output_dir": str(tmp_path / "run"), "micro_batch_size": 3, "precision": "fp32", "device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_preset_without_a_device_is_predicted_and_no_more(run: Callable[..., dict[str, Any]]) -> None:
    found = run("--preset", "llama-2-7b", "--r", "8", "--target-modules", "all-linear", "--max-seq-length", "512")
    values = {"model": {"path": "x"}, "lora": {"r": 8, "target_modules": "all-linear"}, "data": {"train": "x"}}
    spec = build_spec(values | {"training": {"output_dir": "x"}}, "test")
    rows = heaviest_rows([512], [512], spec)
    assert found["predicted_peak_memory_bytes"] == step_bytes(spec, PRESETS["llama-2-7b"], rows, cuda=True).peak
    assert found["predicted_peak_memory_bytes"] == sum(found["predicted_memory_bytes"].values())
    assert found["fits"] is None
    assert "remedies" not in found


def test_what_is_called_the_largest_fits_and_one_more_does_not(run: Callable[..., dict[str, Any]]) -> None:
    base = ("--preset", "llama-2-7b", "--memory", "24GiB", "--max-seq-length", "512", "model.placement=device")
    found = run(*base)
    assert found["fits"]
    assert found["memory_limit_bytes"] == 24 * GIB * 9 // 10
    most = found["largest_micro_batch_size"]
    assert run(*base, "--micro-batch-size", str(most))["fits"]
    assert not run(*base, "--micro-batch-size", str(most + 1))["fits"]
    longest = found["largest_row_tokens"]
    assert longest == PRESETS["llama-2-7b"].max_position_embeddings


def test_what_does_not_fit_comes_with_what_helps(run: Callable[..., dict[str, Any]]) -> None:
    base = ("--preset", "llama-2-7b", "--memory", "10GiB", "model.placement=device")
    found = run(*base)
    assert not found["fits"]
    assert found["recomputed_layers"]["the whole block"] == 32
    helpful = [remedy["change"] for remedy in found["remedies"] if remedy["fits"]]
    assert helpful == ["model.dtype=float8", "model.dtype=nf4", "model.placement=host"]
    costs = [remedy["more_compute"] for remedy in found["remedies"] if remedy["more_compute"] is not None]
    assert costs == sorted(costs)
    assert run(*base[:-1], *helpful[1:])["fits"]


def test_a_7b_in_float8_takes_a_byte_a_weight(run: Callable[..., dict[str, Any]]) -> None:
    """1 x 512, q and v: with nothing recomputed the peak is to stay within 8.5 GiB."""
    base = ("--preset", "llama-2-7b", "--micro-batch-size", "1", "training.gradient_accumulation_steps=1")
    found = run(*base, "model.dtype=float8")
    rows = 3 * 4096 + 4096 + 2 * 11008 + 4096  # of the seven matrices, which have a scale each
    matrices = 4 * 4096**2 + 3 * 4096 * 11008
    others = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    assert found["predicted_memory_bytes"]["weights"] == 32 * (matrices + 4 * rows) + 2 * others
    assert found["predicted_peak_memory_bytes"] <= 8.5 * GIB


def test_a_spec_is_planned_for_its_longest_rows(
    run: Callable[..., dict[str, Any]], spec_file: Path, prepared: Callable[..., Path]
) -> None:
    lengths = sorted(open_prepared(prepared()).train.lengths)
    found = run(str(spec_file), "--device", "cpu", "--memory", "1GiB", "training.tokens_per_pass=null")
    assert found["pass_tokens"] == sum(lengths[-3:])
    joined = run(str(spec_file), "--device", "cpu", "--memory", "1GiB")
    assert joined["pass_tokens"] == sum(lengths), "all rows are one window"
    gpu = (str(spec_file), "--device", "cuda")
    assert run(*gpu, "training.micro_batch_size=2")["pass_tokens"] == sum(lengths[-2:])
    assert run(*gpu, "--max-seq-length", "7")["pass_tokens"] == 3 * 7


def test_a_dry_run_says_the_same(run: Callable[..., dict[str, Any]], spec_file: Path) -> None:
    found = run(str(spec_file), "--device", "cpu", "training.memory_limit=100KiB")
    plan = plan_training(load_spec(spec_file, ["training.memory_limit=100KiB"]))["memory_plan"]
    assert plan == found
    assert not found["fits"]


SPECS: list[list[str]] = [
    [],
    ["training.memory_limit=100KiB"],
    ["training.memory_limit=2MiB", "training.micro_batch_size=1"],
    ["training.memory_limit=1GiB", "training.tokens_per_pass=null"],
    ["training.tokens_per_pass=40"],
    ["data.packing=true", "training.memory_limit=1GiB"],
    ["training.precision=bf16", "model.dtype=bfloat16", "training.optimizer=adamw_8bit"],
    ["model.dtype=nf4", "model.num_layers=1"],
    ["model.dtype=float32", "lora=null", "training.activation_checkpointing=block"],
    ["model.placement=host", "lora.kind=dora"],
    ["training.fused=false", "evaluation.at_start=false"],
]


@pytest.mark.parametrize("changes", SPECS, ids=" ".join)
def test_a_dry_run_and_a_plan_of_one_spec_are_equal(
    run: Callable[..., dict[str, Any]], spec_file: Path, changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, without a word about device and memory: what is free is looked up by both."""
    for module in ("llamatune.host_memory", "llamatune.devices"):
        monkeypatch.setattr(f"{module}.free_host_bytes", lambda: 3 * GIB)
    changes = ["training.device=cpu", *changes]
    plan = plan_training(load_spec(spec_file, changes))["memory_plan"]
    assert run(str(spec_file), *changes) == plan
    assert run(str(spec_file), "--device", "cpu", *changes[1:]) == plan


def test_that_the_memory_is_not_known_is_said(command: Callable[..., Any], spec_file: Path) -> None:
    told = "the memory is not known: planned as if a pass had one micro-batch; give it, as 24GiB"
    gpu = ("plan-memory", spec_file, "--device", "cuda")
    assert told in command(*gpu).stderr
    for more in (("--memory", "1GiB"), ("training.memory_limit=1GiB",), ("training.tokens_per_pass=null",)):
        assert told not in command(*gpu, *more).stderr


def test_lengths_are_those_of_the_data(prepared: Callable[..., Path], tmp_path: Path) -> None:
    split = open_prepared(prepared()).train
    assert read_lengths(prepared()) == (split.lengths, split.target_counts)
    (tmp_path / "train.safetensors").write_bytes((prepared() / "train.safetensors").read_bytes()[:-3])
    with pytest.raises(DataError):
        read_lengths(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "neither a spec nor --preset"),
        (("--preset", "llama-9"), "unknown preset"),
        (("--preset", "llama-2-7b", "--memory", "much"), "is no size"),
        (("--preset", "llama-2-7b", "--device", "tpu"), "--device"),
        (("--preset", "llama-2-7b", "--max-seq-length", "0"), "--max-seq-length"),
        (("--preset", "llama-2-7b", "--r", "0"), "lora.r"),
        (("--preset", "llama-2-7b", "training.memory_limit=lots"), "training.memory_limit"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Callable[..., dict[str, Any]], arguments: tuple[str, ...], words: str
) -> None:
    assert words in run(*arguments, code=2)["error"]


def test_torch_is_not_loaded(spec_file: Path) -> None:
    code = f"""
import sys
from llamatune import cli
try:
    cli.main(["plan-memory", {str(spec_file)!r}, "--memory", "16GiB"])
except SystemExit as left:
    assert left.code == 0
assert not {{"torch", "safetensors", "numpy"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in ("weights", "fits into 14.40 GiB", "largest that fit"):
        assert words in done.stdout


def test_the_moments_are_explained_where_they_are_asked_for(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--preset", "llama-2-7b", "--target-modules", "all-linear", "--memory", "24GiB", "--micro-batch-size", "8")
    assert "moments" not in run(*base)
    found = run(*base, "--explain")
    (peak,) = [moment for moment in found["moments"] if "alive" in moment]
    assert peak["bytes"] == found["predicted_peak_memory_bytes"] == sum(peak["alive"].values())
    assert peak["memory_bytes"] == found["predicted_memory_bytes"]
    assert peak["bytes"] == max(moment["bytes"] for moment in found["moments"])
    with pytest.raises(SystemExit):
        cli.main(["plan-memory", *base, "--explain"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{peak['step']} <- peak" in shown
    assert "alive at the peak" in shown
    assert "kept by attention: q, k, v" in shown


@pytest.mark.parametrize(("ranks", "placement"), [("1", "host"), ("4", "shard")])
def test_a_base_that_does_not_fit_is_planned_elsewhere(
    run: Callable[..., dict[str, Any]], ranks: str, placement: str
) -> None:
    base = ("--preset", "llama-2-7b", "--memory", "10GiB", "--ranks", ranks)
    found, on_device = run(*base), run(*base, "model.placement=device")
    assert (found["placement"], found["fits"]) == (placement, True)
    assert not on_device["fits"]
    assert found == run(*base, f"model.placement={placement}")
    block, others = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), 2 * (2 * 32000 + 1) * 4096
    at_rest = 32 * block // 4 if placement == "shard" else 0
    assert found["predicted_memory_bytes"]["weights"] == at_rest + 2 * block + others
    assert found["bytes_brought_per_pass"] == 60 * (block * 3 // 4 if placement == "shard" else block)
    assert run("--preset", "llama-2-7b", "--memory", "40GiB", "--ranks", ranks)["placement"] == "device"
    assert run(*base, "--device", "cpu")["placement"] == ("device" if ranks == "1" else "shard")


def test_full_fine_tuning_is_divided_among_ranks() -> None:
    """What is gathered stays: all outside the blocks, three blocks, and the gradients of two."""
    values = {
        "model": {"path": "base", "dtype": "float32"}, "data": {"train": "data"},
        "training": {"output_dir": "run", "device": "cuda", "num_epochs": 1, "learning_rate": 1e-5},
    }  # fmt: skip
    config, spec = PRESETS["llama-2-7b"], build_spec(values, "test")
    one, four = (plan_memory(spec, config, Rows((512,), 512, 8, ranks), True, None).step for ranks in (1, 4))
    block, others = 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), 4 * (2 * 32000 + 1) * 4096
    assert one.weights == 32 * block + others
    assert four.weights == one.weights // 4 + others + 3 * block
    assert four.optimizer_state == pytest.approx(one.optimizer_state / 4, rel=1e-5)
    assert four.gradients == one.gradients // 4
    assert four.peak < 0.4 * one.peak

"""What benchmarks/equality.py calls equal and what it calls a difference: a fault of each kind is seen and named."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
STEP = "run/checkpoints/step-000002"
WEIGHTS, STATE = f"{STEP}/adapter_model.safetensors", f"{STEP}/state.json"
LOG, SUMMARY = "run/metrics.jsonl", "run/summary.json"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("equality_files")


def write_run(folder: Path, seconds: float) -> Path:
    """A run of two steps in small, with ``seconds`` wherever a run holds time or memory that was measured."""

    def write(name: str, value: Any) -> None:
        (folder / name).write_text(json.dumps(value, indent=2))

    (folder / STEP).mkdir(parents=True)
    lines = [{"event": "step", "step": step, "loss": 1 / step, "tokens_per_second": 9 / seconds, "elapsed_s": seconds}
             for step in (1, 2)]  # fmt: skip
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / LOG).write_text(log)
    (folder / "run/spec.yaml").write_text("training:\n  seed: 0\n")
    (folder / "run/.llamatune.lock").write_text(f"held for {seconds} s")
    write(SUMMARY, {
        "steps": 2, "runtime_s": seconds, "best_step": None, "peak_memory_bytes": int(seconds),
        "epochs": [{"loss": 0.75, "epoch_s": seconds}], "output_dir": str(folder / "run"),
    })  # fmt: skip
    write(STATE, {
        "step": 2, "position": {"window": 2, "training_s": seconds}, "metrics_bytes": len(log),
        "llamatune": f"{seconds}.0",
    })  # fmt: skip
    write(f"{STEP}/llamatune.json", {"files": {
        "adapter_model.safetensors": {"bytes": 99, "sha256": "a" * 64},
        "state.json": {"bytes": int(seconds), "sha256": f"{int(seconds):064}"},
    }})  # fmt: skip
    tensors = {"lora_A": torch.arange(6.0).view(2, 3), "lora_B": torch.zeros(3, 2)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the value that a JSON file holds; ``change`` returns another one, or changes what it is given."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed, indent=2))

    return apply


def in_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert text.count(old) >= 1
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


def in_tensors(change: Callable[[dict[str, Any]], Any], **metadata: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})

    return apply


def negate_a_zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lora_B"][1, 1] = -0.0


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit of a weight": (in_tensors(negate_a_zero), "tensor lora_B: 1 of 24 bytes differ"),
    "a shape": (in_tensors(lambda t: t.update(lora_A=t["lora_A"].view(3, 2))), "shape [2, 3] became [3, 2]"),
    "a dtype": (in_tensors(lambda t: t.update(lora_A=t["lora_A"].int())), "tensor lora_A: dtype F32 became I32"),
    "a tensor too few": (in_tensors(lambda t: t.pop("lora_B")), "tensor lora_B: only before"),
    "a tensor too many": (in_tensors(lambda t: t.update(lora_C=torch.ones(1))), "tensor lora_C: only after"),
    "metadata": (in_tensors(lambda t: None, made="now"), "metadata: .made: only after"),
    "a file cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "(216 and 215 bytes)"),
    "no tensors at all": (lambda f: (f / WEIGHTS).write_bytes(b""), "(216 and 0 bytes)"),
    "a loss": (in_text(LOG, "0.5", "0.500001"), "line 2: .loss: 0.5 became 0.500001"),
    "a metric's name": (in_text(LOG, "elapsed_s", "elapsed"), "line 1: .elapsed_s: only before"),
    "a line too many": (lambda f: (f / LOG).write_text((f / LOG).read_text() + "{}\n"), "2 lines became 3"),
    "no number for a time": (in_json(SUMMARY, lambda v: v.update(runtime_s=None)), ".runtime_s: 0 became null"),
    "a key like a time": (in_json(SUMMARY, lambda v: v.update(saved_s=1)), ".saved_s: only after"),
    "a value deep inside": (in_json(SUMMARY, lambda v: v["epochs"][0].update(loss=1)), ".epochs[0].loss: 0.75 bec"),
    "an int for a float": (in_json(SUMMARY, lambda v: v.update(steps=2.0)), ".steps: 2 became 2.0"),
    "the order of keys": (in_json(SUMMARY, lambda v: dict(reversed(v.items()))), "summary.json: byte "),
    "another folder": (in_text(SUMMARY, '/run"', '/other"'), '.output_dir: "./run" became "./other"'),
    "a position": (in_json(STATE, lambda v: v["position"].update(window=3)), ".position.window: 2 became 3"),
    "a log cut elsewhere": (in_json(STATE, lambda v: v.update(metrics_bytes=0)), ".metrics_bytes: 2 became 0"),
    "a log cut in a line": (in_json(STATE, lambda v: v.update(metrics_bytes=9)), ".metrics_bytes: 2 became -1"),
    "a log cut behind its end": (in_json(STATE, lambda v: v.update(metrics_bytes=9999)), ".metrics_bytes: 2 became -1"),
    "a digest": (in_text(f"{STEP}/llamatune.json", "a" * 64, "b" * 64), ".files.adapter_model.safetensors.sha256: "),
    "text": (in_text("run/spec.yaml", "seed: 0", "seed: 1"), "spec.yaml: byte 18, line 2 "),
    "a file too few": (lambda f: (f / "run/spec.yaml").unlink(), "run/spec.yaml: only before"),
    "a file too many": (lambda f: (f / "run/.spec.yaml").touch(), "run/.spec.yaml: only after"),
}


def test_times_measured_memory_and_the_place_of_a_run_are_no_difference(files: ModuleType, tmp_path: Path) -> None:
    before, after = write_run(tmp_path / "a", 1.5), write_run(tmp_path / "b" / "longer", 1234.75)
    compared = files.compare_folders(before, after, (before, after))
    assert (compared.difference, compared.files) == (None, 6)
    assert compared.bytes == sum(path.stat().st_size for path in before.rglob("*[!k]") if path.is_file())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_difference_of_any_other_kind_is_seen_and_named(files: ModuleType, tmp_path: Path, fault: str) -> None:
    before, after = write_run(tmp_path / "a", 1.5), write_run(tmp_path / "b", 1234.75)
    apply, expected = FAULTS[fault]
    apply(after)
    difference = files.compare_folders(before, after, (before, after)).difference
    assert difference is not None
    assert expected in difference


def test_the_commands_of_both_sides_run_and_a_changed_constant_ends_in_exit_code_1(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "llamatune", tmp_path / "llamatune", ignore=shutil.ignore_patterns("__pycache__"))
    encoding = tmp_path / "llamatune" / "data" / "encoding.py"
    encoding.write_text(encoding.read_text().replace("True, self.tokenizer.eos_id)", "True, self.tokenizer.bos_id)"))

    def compare(after: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benchmarks" / "equality.py"), "--before", str(ROOT), "--after",
                   str(after), "--only", "prepare-text"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=False)

    same, other = compare(ROOT), compare(tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "1 configurations, 3 files" in same.stdout
    assert "all equal" in same.stdout
    assert other.returncode == 1, other.stderr
    assert "DIFFERS: prepared/train.safetensors: tensor input_ids: " in other.stdout

"""Times saving a checkpoint of LLaMA-2-7B's adapter, compared with torch.save and PEFT, alternating.

``python benchmarks/checkpoints.py DIRECTORY`` saves fp32 matrices of rank 16 and their AdamW state into a directory on
the disk to measure; no base is needed. llamatune's time includes the digest (SHA-256), fsync and rename; the others'
time is that of writing, and of fsync where the name says so.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from material import ALPHA, SHAPES, TARGETS, R

from llamatune.checkpoints.training_checkpoint import save_run_state
from llamatune.formats.state_json import SavedState
from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.transformer import Transformer
from llamatune.ranks import ALONE
from llamatune.shapes.adapter import AdapterSpec
from llamatune.spec import build_spec
from llamatune.training.gpu_meter import GpuMeter
from llamatune.training.model_and_optimizer import build_optimizer
from llamatune.training.optimizers.optimizer import Optimizer
from llamatune.training.save_and_resume import RunOutput
from llamatune.training.trainer_state import TrainerState

PHASES = {  # functions of each phase in a profile
    "finite?": ("aminmax", "isfinite"),
    "gather": ("'cpu'", "'contiguous'"),
    "digest": ("'_hashlib.HASH'",),
    "write": ("'_io.BufferedWriter'",),
    "fsync": ("posix.fsync",),
}
Save = Callable[[Path], None]


def llamatune_side(targets: str) -> tuple[Optimizer, Save]:
    """An optimizer after one update, and the function with which training saves it and its weights."""
    values = {
        "model": {"path": "llama-2-7b"},
        "lora": {"r": R, "alpha": ALPHA, "target_modules": list(TARGETS[targets])},
        "data": {"train": "none"},
        "training": {"output_dir": "none"},
    }
    spec = build_spec(values, "benchmark")
    with torch.device("meta"):  # the base is not saved
        model = Transformer(SHAPES["7b"])
        apply_adapter(model, AdapterSpec(R, ALPHA, target_modules=TARGETS[targets]), seed=None)
    for layer in model.modules():
        for name in layer.names if isinstance(layer, AdaptedLinear) else ():
            setattr(layer, name, torch.nn.Parameter(torch.randn(getattr(layer, name).shape)))
    parameters = dict(adapter_parameters(model))
    optimizer = build_optimizer(spec.training, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-4)
    optimizer.zero_grad()
    inputs: Any = SimpleNamespace(
        base_fingerprint="sha256:0", prepared=SimpleNamespace(manifest=SimpleNamespace(template=None))
    )
    learner: Any = SimpleNamespace(parameters=parameters, model=model)
    run: Any = None  # the benchmark chooses the directory
    companions: Any = SimpleNamespace(peft_base=None)
    digests: Any = None  # of no base
    output = RunOutput(spec, inputs, learner, run, ALONE, GpuMeter(None), digests, companions)
    position = asdict(TrainerState(step=1, window=1, saved_window=1, saved_step=1))
    state = SavedState.model_validate({"step": 1, "position": position, "scaler": {}, "metrics_bytes": 0})

    def save(directory: Path) -> None:
        save_run_state(directory / "step-000001", output.write_weights, optimizer.state_tensors(), state)

    return optimizer, save


def torch_save(optimizer: Optimizer, sync: bool) -> Save:
    """``torch.save`` of everything into one file."""

    def save(directory: Path) -> None:
        with (directory / "checkpoint.pt").open("wb") as file:
            torch.save({"weights": dict(optimizer.parameters), "optimizer": optimizer.state}, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    return save


def peft_save(optimizer: Optimizer, targets: str) -> Save:
    """PEFT's ``save_pretrained``, and ``torch.save`` of the optimizer, as transformers' Trainer does."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES["7b"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**{name: getattr(shape, name) for name in names}))
        model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[targets])))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape)))

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        torch.save(optimizer.state, directory / "optimizer.pt")

    return save


def timed(save: Save, scratch: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds, and MiB of memory beyond what was in use before."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before_kib, started, processor = memory_kib("VmRSS"), time.monotonic(), time.process_time()
        save(Path(directory))
        return time.monotonic() - started, time.process_time() - processor, (memory_kib("VmHWM") - before_kib) / 1024


def memory_kib(name: str) -> int:
    """One value of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def phases(save: Save, scratch: Path) -> dict[str, float]:
    """Seconds of each phase of one save, from a profile."""
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        profile.enable()
        save(Path(directory))
        profile.disable()
    profiled = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    return {
        phase: sum(times[2] for (_, _, function), times in profiled if any(part in function for part in parts))
        for phase, parts in PHASES.items()
    }


def main() -> None:
    """Save, alternating, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--targets", choices=TARGETS, nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.directory.mkdir(parents=True, exist_ok=True)
    for targets in options.targets:
        optimizer, ours = llamatune_side(targets)
        ways = {
            "llamatune": ours,
            "torch.save": torch_save(optimizer, sync=False),
            "torch.save and fsync": torch_save(optimizer, sync=True),
        }
        if importlib.util.find_spec("peft") is not None:
            ways["PEFT's save_pretrained, torch.save"] = peft_save(optimizer, targets)
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, save in ways.items():
                results[name].append(timed(save, options.directory))
        count = sum(parameter.numel() for parameter in optimizer.parameters.values())
        sys.stdout.write(f"{targets}: {count:,} parameters, {12 * count / 1e6:.1f} MB with AdamW's state\n")
        for name, runs in results.items():
            seconds, processor, mib = (statistics.median(column) for column in zip(*runs, strict=True))
            least, most = min(run[0] for run in runs), max(run[0] for run in runs)
            took = f"{seconds:.3f} s ({least:.3f}-{most:.3f}), processor {processor:.3f} s"
            sys.stdout.write(f"  {name:35} {took}, {mib:.1f} MiB more\n")
        shares = ", ".join(f"{phase} {share:.3f} s" for phase, share in phases(ours, options.directory).items())
        sys.stdout.write(f"  of llamatune's: {shares}\n")


if __name__ == "__main__":
    main()

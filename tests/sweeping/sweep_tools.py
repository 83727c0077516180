"""Sweeps of a test: their options, and what their runs must come out as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from run_tools import assert_same_outcome, metrics

from llamatune.command_options.sweep import SweepOptions
from llamatune.sweeping.members import plan_members
from llamatune.training.train import train

GRID = ("lora.r=2,4", "training.learning_rate=0.01,0.03")
"""Four runs."""

VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fp32, rank, rate and dropout": (
        {},
        ("lora.r=3,5", "training.learning_rate=0.01,0.003", "lora.dropout=0.1"),
    ),
    "targets and seeds": (
        {"training__lr_scheduler": "cosine", "training__warmup_steps": 2, "training__max_grad_norm": 0.4},
        ("lora.target_modules=[q_proj,v_proj],all-linear", "training.seed=0,4"),
    ),
    "lengths of the runs, evaluations with answers, and optimizers": (
        {"lora": {"r": 4, "dropout": 0.2, "target_modules": "all-linear"},
         "evaluation__prompts": 2, "evaluation__max_new_tokens": 4},
        ("training.num_epochs=1,1.5", "evaluation.every_steps=1,3", "training.optimizer=adamw"),
    ),
    "kinds, on a bf16 base computed in fp32": (
        {"model__dtype": "bfloat16"},
        ("lora.kind=lora,dora,lora_fa", "training.optimizer=sgd"),
    ),
    "nf4 in bf16, passes of several micro-batches": (
        {"model__dtype": "nf4", "training__precision": "bf16", "training__tokens_per_pass": 64},
        ("lora.init=kaiming,pissa", "lora.dropout=0.1,0"),
    ),
    "int8 in fp32, packed, recomputed": (
        {"model__dtype": "int8", "data__packing": True, "data__packed_tokens": 60,
         "training__activation_checkpointing": "block"},
        ("lora.r=2,4", "data.shuffle=true"),
    ),
    "fp16 with overflows": (
        {"training__precision": "fp16"},
        ("lora.alpha=8,16", "lora.target_modules=all-linear"),
    ),
    "bf16, early stopping": (
        {"training__precision": "bf16", "training__num_epochs": 4, "evaluation__early_stopping_patience": 1,
         "evaluation__every_steps": 1},
        ("training.learning_rate=0.001,0.5", "lora.alpha=4"),
    ),
}  # fmt: skip
"""Changes to the spec, and a grid of runs that are trained together."""


def options(spec: Path, output: Path, *grid: str, **more: Any) -> SweepOptions:
    return SweepOptions(spec_path=spec, grid=grid, output=output, **more)


def assert_equal_to_solo_runs(output: Path, spec: Path, *grid: str) -> None:
    """Every run of a sweep against ``train`` of its spec alone, which is trained once a spec file."""
    _, members = plan_members(options(spec, spec.with_name("solo"), *grid))
    for member in members:
        assert member.spec is not None
        train(member.spec)
        # a card tells its output directory
        assert_same_outcome(output / "runs" / member.name, member.path, cards=False)
        found, expected = (metrics(path) for path in (output / "runs" / member.name, member.path))
        assert [line["event"] for line in found] == [line["event"] for line in expected]

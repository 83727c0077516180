"""The batch script of a training job for Slurm: what it asks for, the step that trains, the requeue after a signal."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from llamatune.command_options.slurm import SlurmOptions
from llamatune.errors import SpecError
from llamatune.spec import RunSpec, load_spec

_SIGNAL_S, _EARLIER_S, _UNUSED = 120, 60, 0.02
"""How long before the time limit a signal comes, and how much earlier Slurm may send it.

A run watches the time itself. Where a signal costs a larger share of the job than this, none is asked for.
"""

_ENVIRONMENT = """
export WANDB_MODE=offline  # compute nodes often have no network
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from sbatch
fi
"""
_STEP = """
code=0
srun --kill-on-bad-exit=0 --export=ALL llamatune train {spec} || code=$?
if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ]; then
    scontrol requeue "{job}" || true
fi
exit "$code"
"""


def slurm_script(options: SlurmOptions) -> str:
    """A script for ``sbatch``, submitted where it was made. srun starts a process for each GPU, or one on a node.

    docs/slurm.md says what each line is for.

    Raises:
        SpecError: a spec is invalid, two of them write to one directory, or their devices do not fit the GPUs.
    """
    specs = {path: load_spec(path) for path in options.specs}
    _refuse_shared_directories(options.specs, specs)
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = int(any(spec.training.device != "cpu" for spec in specs.values()))
    for path, spec in specs.items():
        _refuse_other_device(path, spec.training.device, gpus)
    asked = {
        "job-name": "llamatune",
        "nodes": options.nodes,
        "ntasks-per-node": max(1, gpus),
        "gpus-per-node": gpus or None,
        "cpus-per-task": options.cpus_per_task,
        "partition": options.partition,
        "time": options.time,
        "array": f"0-{len(options.specs) - 1}" if options.array else None,
        "signal": f"USR1@{_SIGNAL_S}" if options.time_s * _UNUSED >= _SIGNAL_S + _EARLIER_S else None,
        "requeue": True,
        "open-mode": "append",
        "output": "train-%A_%a.log" if options.array else "train-%j.log",
    }
    head = [
        f"#SBATCH --{name}" + ("" if value is True else f"={value}")
        for name, value in asked.items()
        if value is not None
    ]
    names = [_quoted(path) for path in options.specs]
    spec_word, job, listed = names[0], "$SLURM_JOB_ID", ""
    if options.array:  # SLURM_JOB_ID of the last task is that of the whole array
        spec_word, job = '"${specs[$SLURM_ARRAY_TASK_ID]}"', "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
        listed = "".join(["\nspecs=(\n", *(f"    {name}\n" for name in names), ")\n"])
    return "\n".join(["#!/bin/bash", *head, ""]) + _ENVIRONMENT + listed + _STEP.format(spec=spec_word, job=job)


def _refuse_shared_directories(paths: Sequence[Path], specs: dict[Path, RunSpec]) -> None:
    runs: dict[str, Path] = {}
    for path in paths:
        directory = specs[path].training.output_dir
        place = os.path.realpath(directory)
        if place in runs:
            raise SpecError(f"{runs[place]} and {path} write to one directory", directory, "give each its own")
        runs[place] = path


def _refuse_other_device(path: Path, device: str, gpus: int) -> None:
    """A spec for the CPU leaves GPUs idle, one for CUDA needs one, and the ranks of a node cannot share ``cuda:N``."""
    fits = device == "auto" or ((device == "cpu") == (gpus == 0) and not (":" in device and gpus > 1))
    if not fits:
        what = f"training.device is {device}, and the job has {gpus} GPUs a node"
        raise SpecError(what, path, "change the device (auto fits any) or --gpus-per-node")


def _quoted(path: Path) -> str:
    """The path as one word of the shell that llamatune does not take for an option."""
    text = str(path)
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text):
        raise SpecError("the path has control characters, or is not UTF-8", text, "rename the spec")
    return shlex.quote(f"./{text}" if text.startswith("-") else text)

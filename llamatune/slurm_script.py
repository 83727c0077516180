"""The batch script of a training job for Slurm: what it asks for, the step that trains, the requeue after a signal."""

from __future__ import annotations

import shlex

from llamatune.options.slurm import SlurmOptions

SIGNAL_S = 120
"""The signal comes so long before the time limit, up to a minute earlier: an update and a save must fit into it."""

_REQUEUE = """\
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
"""


def slurm_script(options: SlurmOptions) -> str:
    """A script for ``sbatch``. srun starts one process for each GPU, and one on a node without any.

    Without ``exec``, and with srun alone: torchrun turns every exit code into 1, and only 75 asks for another start.
    """
    processes = max(1, options.gpus_per_node)
    asked = {
        "job-name": "llamatune",
        "nodes": options.nodes,
        "ntasks-per-node": processes,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "partition": options.partition,
        "time": options.time,
        "array": f"0-{len(options.specs) - 1}" if options.array else None,
        "signal": f"USR1@{SIGNAL_S}",
        "requeue": "",
        "open-mode": "append",
        "output": "train-%A_%a.log" if options.array else "train-%j.log",
    }
    head = [f"#SBATCH --{name}={value}".rstrip("=") for name, value in asked.items() if value is not None]
    specs = [shlex.quote(str(path)) for path in options.specs]
    spec = specs[0]
    body = ["# Compute nodes have no network: trackers write to the disk.", "export WANDB_MODE=offline"]
    if options.cpus_per_task is not None:
        cores = options.cpus_per_task
        body += [f"export OMP_NUM_THREADS={cores} SRUN_CPUS_PER_TASK={cores}"]  # srun does not take it from sbatch
    if options.array:
        body += ["specs=(", *(f"    {path}" for path in specs), ")"]
        spec = '"${specs[$SLURM_ARRAY_TASK_ID]}"'
    body += ["code=0", f"srun llamatune train {spec} || code=$?"]
    return "\n".join(["#!/bin/bash", *head, "", *body, _REQUEUE])

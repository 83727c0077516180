"""``llamatune slurm``: a batch script that trains, stops at the time limit, and is requeued until the run is done."""

from __future__ import annotations

from llamatune.command_options.slurm import SlurmOptions
from llamatune.commands._console import Console


def slurm(options: SlurmOptions, console: Console) -> None:
    """Write a Slurm script that trains, saves at the time limit and goes on."""
    import shlex

    from llamatune.output_files import write_output
    from llamatune.slurm_script import slurm_script

    with console:
        script = slurm_script(options)
        payload = {"output": None if options.output is None else str(options.output), "script": script}
        if options.output is None:
            console.result(payload, lambda out: out.out(script, end="", highlight=False))
        else:
            write_output(options.output, script.encode(), options.overwrite)
            submit = f"written: sbatch {shlex.quote(str(options.output))}"
            console.result(payload, lambda out: out.print(submit))

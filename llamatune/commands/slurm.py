"""``llamatune slurm``: a batch script that trains, stops at the time limit, and is requeued until the run is done."""

from __future__ import annotations

from llamatune.command_options.slurm import SlurmOptions
from llamatune.commands._console import Console


def slurm(options: SlurmOptions, console: Console) -> None:
    """Write a Slurm script that trains, saves at the time limit and goes on."""
    from llamatune.durable_writing import refuse_occupied, write_atomic
    from llamatune.errors import SpecError
    from llamatune.slurm_script import slurm_script
    from llamatune.spec import load_spec

    with console:
        runs: dict[str, object] = {}
        for path in options.specs:
            directory = load_spec(path).training.output_dir
            if directory in runs:
                raise SpecError(f"{runs[directory]} and {path} write to {directory}", None, "give each its own")
            runs[directory] = path
        script = slurm_script(options)
        if options.output is not None:
            refuse_occupied(options.output, options.overwrite)
            write_atomic(options.output, script.encode())
            result = {"output": str(options.output), "script": script}
            console.result(result, lambda out: out.print(f"written: sbatch {options.output}", markup=False))
        else:
            console.result({"output": None, "script": script}, lambda out: out.out(script, end="", highlight=False))

"""``llamatune slurm``: a batch script that trains, stops at the time limit, and is requeued until the run is done."""

from __future__ import annotations

from typing import Annotated

import typer

from llamatune.options.slurm import SlurmOptions


def slurm(
    options: SlurmOptions,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the script in a JSON object.")] = False,
) -> None:
    """Write a Slurm script that trains, saves at the time limit and goes on."""
    from llamatune.commands._console import Console
    from llamatune.durable_writing import refuse_occupied, write_atomic
    from llamatune.errors import SpecError
    from llamatune.slurm_script import slurm_script
    from llamatune.spec import load_spec

    with Console(json_mode) as console:
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

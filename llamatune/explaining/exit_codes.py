"""The exit codes: what each means, an error that ends with it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from llamatune import errors


@dataclass(frozen=True)
class ExitCode:
    """``kinds`` are the classes of errors that end so; none: no error of ours does."""

    code: int
    name: str
    meaning: str
    example: str
    todo: str
    kinds: tuple[type[errors.LlamatuneError], ...] = ()


EXIT_CODES = (
    ExitCode(
        0,
        "done",
        "The command did what it says, or found that it is done already: a finished output of the same inputs is left "
        "as it is.",
        "runs/alpaca is finished: nothing to do",
        "Nothing.",
    ),
    ExitCode(
        1,
        "a bug of llamatune",
        "Something happened that the program does not provide for. It ends with a traceback; nothing is half-written.",
        "Traceback (most recent call last): ...",
        "Report it with the traceback, the command and what `llamatune env` prints. Files are sound: the same command "
        "may be run again.",
    ),
    ExitCode(
        2,
        "the command line or the run spec is wrong",
        "An option, an argument, an override or a key of the spec cannot be used, or two of them contradict each "
        "other. It is found before anything is computed. All faults of a spec are reported together.",
        "error: lora.rank: unknown key, did you mean 'r'?: run.yaml",
        "Change what the message names. `llamatune explain KEY` describes a key of the spec, `llamatune VERB --help` "
        "the options of a verb.",
        (errors.SpecError,),
    ),
    ExitCode(
        3,
        "rows of a data file cannot be used",
        "A file of rows, or a prepared directory, holds something that is no row of its format. The message "
        "names file, line and what the row has.",
        "error: rows.jsonl:17: no field 'output'; the row has 'instruction', 'input'",
        "Mend the row, name the columns with --map, or leave bad rows out with --skip-bad-rows N.",
        (errors.DataError,),
    ),
    ExitCode(
        4,
        "a model, adapter, tokenizer or checkpoint cannot be used",
        "A file is missing, damaged, unsafe to read, of another kind of model, or does not fit what it is used "
        "with, as an adapter that was trained on another base.",
        "error: the adapter was trained on another base: runs/alpaca/adapter: give its own base, or pass --force-base",
        "Give the directory that belongs here, fetch it again, or run `llamatune verify DIR` to see which file is "
        "damaged.",
        (errors.CheckpointError,),
    ),
    ExitCode(
        5,
        "the machine: device, memory, disk, permission, a directory in use",
        "The request is right, and the machine cannot do it now: too little memory or disk, no such device, an output "
        "that exists, a directory that another process uses, a package that is not installed.",
        "error: exists: report.html: choose another output, or pass --overwrite",
        "Free what is short, or ask for less; `llamatune plan-memory SPEC --memory SIZE` says what fits and what "
        "would.",
        (errors.EnvironmentFault, errors.OutOfMemory),
    ),
    ExitCode(
        6,
        "a loss or gradient is not finite, or a requirement of judge does not hold",
        "The numbers overflowed, or became NaN: the run is not worth going on with. The last checkpoint is from "
        "before. Of `judge --require`: a figure is not as it should be; the result is printed before the error, also "
        "under --json, where stdout is empty after any other error.",
        "error: the loss is not finite at step 41, among row 320 (bfloat16 weights, bf16): runs/alpaca: the last good "
        "checkpoint is step-000040; lower training.learning_rate",
        "Lower training.learning_rate, use training.precision: bf16 in place of fp16, keep max_grad_norm, and look at "
        "the rows of that window. Of `judge --require`: read the requirements in the result, and train otherwise.",
        (errors.NumericsError, errors.RequirementFailed),
    ),
    ExitCode(
        75,
        "stopped by a signal or before a time limit, and the same command completes it",
        "A verb that writes got SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2 (Ctrl-C, a time limit, scancel), or "
        "`train` stopped by itself before training.max_time or the end of its Slurm job. `train` has saved a "
        "checkpoint and goes on from it; prepare-data and merge-lora start over. It is sysexits' EX_TEMPFAIL, so a "
        "batch script knows to requeue.",
        "error: stopped by a signal after step 120 of 900: runs/alpaca: run the same command again to continue",
        "Run the same command again.",
        (errors.Stopped,),
    ),
    ExitCode(
        130,
        "interrupted in a verb that only reads",
        "Ctrl-C, or another signal, ended a verb that leaves nothing behind, as generate or count-params.",
        "error: stopped by a signal",
        "Nothing: no file was being written.",
        (errors.Stopped,),
    ),
)


def exit_code(number: int) -> ExitCode | None:
    """The entry of an exit code; None: no verb ends with it."""
    return next((entry for entry in EXIT_CODES if entry.code == number), None)

"""The command line: builds the Typer app, maps errors to exit codes. Loads nothing heavy."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated

import typer

from llamatune import __version__
from llamatune.commands._completion import VARIABLE, asked_verb, join_words_of_bash
from llamatune.commands._console import faults_of_stdout
from llamatune.commands._several_ranks import ending_together, reports_stop
from llamatune.commands._typer_options import StrictCommand, VerbGroup, with_options
from llamatune.errors import FailedElsewhere, LlamatuneError, Stopped, printable
from llamatune.events import ShouldStop, never_stop
from llamatune.host_memory import free_host_bytes
from llamatune.stop_signals import stop_signals

# The function of a verb has its name, in the module of that name: commands/prepare_data.py, prepare_data.
VERBS = {
    "Core verbs": ("prepare-data", "train", "merge-lora", "generate", "count-params"),
    "More verbs": (
        "evaluate",
        "judge",
        "chat",
        "sweep",
        "benchmark",
        "plan-memory",
        "report",
        "verify",
        "demo",
        "slurm",
        "env",
    ),
    "Help": ("init", "schema", "explain", "docs"),
    "Formats": ("convert", "convert-adapter", "extract-lora"),
}
_WRITERS = ("prepare-data", "train", "merge-lora", "sweep", "benchmark", "demo", "report", *VERBS["Formats"])
_LONGEST_USAGE = 1000
_CONTINUED = {"evaluate": (("--output",),), "generate": (("--output",), ("--prompt-file", "--from-data"))}
"""Verbs that write files, always or where one of each of these options is given: a stop is exit 75, of others 130."""


def _load_verb(name: str) -> Callable[..., None]:
    module = name.replace("-", "_")
    return with_options(getattr(importlib.import_module(f"llamatune.commands.{module}"), module))


def build_app(only: str | None = None) -> typer.Typer:
    """Every verb, the five core ones first; or the one verb that is about to run, which starts faster."""
    app = typer.Typer(
        name="llamatune",
        cls=VerbGroup,
        help="Fine-tune LLaMA models with LoRA.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        with faults_of_stdout():
            if version:
                typer.echo(f"llamatune {__version__}")
            elif context.invoked_subcommand is None:
                typer.echo(context.get_help())

    for panel, names in VERBS.items():
        for name in names if only is None else {only} & set(names):
            app.command(name, cls=StrictCommand, rich_help_panel=panel)(_load_verb(name))
    return app


def _complete() -> int:
    """Answer a shell that asks for completions, or for the script that asks; ``typer`` implements the protocol."""
    kept, verb = join_words_of_bash(os.environ), asked_verb()
    app = build_app(verb if any(verb in names for names in VERBS.values()) else None)
    os.environ["COLUMNS"] = "10000"  # else what a candidate means is broken into lines, which are candidates
    with contextlib.redirect_stdout(io.StringIO()) as answer, contextlib.suppress(SystemExit):
        app(args=[], prog_name="llamatune", complete_var=VARIABLE)
    if answered := answer.getvalue().rstrip("\n"):
        with faults_of_stdout():
            typer.echo("\n".join(line.removeprefix(kept) for line in answered.splitlines()))
    return 0


class _StoppedEarly(BaseException):
    """A signal before the verb handles signals itself. No work has begun."""

    exit_code = Stopped.exit_code


def _stop_early(number: int, frame: FrameType | None) -> None:
    raise _StoppedEarly


@contextlib.contextmanager
def _unwrapped_stop() -> Iterator[None]:
    """Raise the exception of a signal itself where an import raised another because of it, as ``__set_name__`` does."""
    try:
        yield
    except Exception as fault:
        inner: BaseException | None = fault
        while inner is not None and not isinstance(inner, _StoppedEarly):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise inner from None


def main(arguments: list[str] | None = None, stopped_before: ShouldStop = never_stop) -> None:
    """Run one command and exit with its code. An error that a user can cause is one line on stderr.

    ``stopped_before``: whether a signal came before this call.
    """
    _open_closed_streams()
    # Importing torch makes 170,000 objects that all stay. Collecting garbage among them took a third of a second.
    gc.set_threshold(10_000, 50, 50)
    atexit.register(_keep_garbage)
    code = _exit_code(sys.argv[1:] if arguments is None else arguments, stopped_before)
    _silence_closed_streams()
    sys.exit(code)


def _keep_garbage() -> None:
    """Spare Python its last collection, unless Triton is loaded, which writes to stderr of what is not collected."""
    if "triton" not in sys.modules:
        gc.freeze()


def _open_closed_streams() -> None:
    """Put the null device where a standard stream was closed, before anything else gets its descriptor; write UTF-8."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _silence_closed_streams() -> None:
    """The reader of a pipe may have closed it; keep Python from complaining when it flushes at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _exit_code(words: list[str], stopped_before: ShouldStop = never_stop) -> int:
    verb = next((word for word in words if not word.startswith("-")), "")
    is_continued = verb in _CONTINUED and all(any(word.startswith(of) for word in words) for of in _CONTINUED[verb])
    writes = verb in _WRITERS or is_continued
    stopped = Stopped.exit_code if writes else 130
    try:
        known = words[:1] == [verb] and any(verb in names for names in VERBS.values())
        with stop_signals(_stop_early), ending_together(), _unwrapped_stop():
            if stopped_before():
                raise _StoppedEarly
            if VARIABLE in os.environ:
                return _complete()
            return build_app(verb if known else None)(args=words, standalone_mode=False, prog_name="llamatune") or 0
    except FailedElsewhere as fault:
        return stopped if fault.exit_code == Stopped.exit_code else fault.exit_code
    except Stopped as stop:
        return _fail(str(stop if writes else Stopped(stop.what, stop.where)), stopped)
    except LlamatuneError as fault:
        return _fail(str(fault), fault.exit_code)
    except _StoppedEarly:
        return _fail("stopped by a signal: run the same command again", stopped) if reports_stop() else stopped
    except BrokenPipeError:
        return 0
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # at which Typer exits by itself
            return 0
        raise
    except OSError as fault:
        where = f": {fault.filename}" if fault.filename else ""
        return _fail(f"{fault.strerror or fault}{where}", 5)
    except (MemoryError, ImportError) as fault:  # the libraries alone take some 700 MiB of address space
        if isinstance(fault, ImportError) and "failed to map segment" not in str(fault):
            raise
        free = f"{free_host_bytes():,} bytes are free to this process"
        return _fail(f"out of memory: {free}: free some, or raise its limit (ulimit -v)", 5)
    except Exception as fault:
        if "TORCH_LOGS" in os.environ and isinstance(fault, ValueError) and "log settings" in str(fault):
            return _fail(f"torch does not know this value of TORCH_LOGS: {os.environ['TORCH_LOGS']}: unset it", 5)
        # Typer may carry its own copy of click, so its usage errors are known by what they can do.
        if hasattr(fault, "format_message") and hasattr(fault, "exit_code"):
            context = getattr(fault, "ctx", None)
            of_verb = context.command_path if context else "llamatune"
            return _fail(f"{_in_plain_words(fault.format_message())}: see {of_verb} --help", 2)
        raise


def _in_plain_words(usage: str) -> str:
    """What Typer says of a usage error, without pydantic's words; a long value is cut."""
    told = re.sub(r"Input (should be a valid \w+), unable to parse string as an? \w+", r"it \1", usage.rstrip("."))
    told = told.replace("Unable to parse input string as an integer, exceeded maximum size", "it has too many digits")
    return told if len(told) <= _LONGEST_USAGE else f"{told[:_LONGEST_USAGE]} ..."


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"error: {printable(message)}\n")
        sys.stderr.flush()
    return code

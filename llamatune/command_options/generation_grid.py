"""Options of ``benchmark --generate``: a model, an adapter, and the axes of the grid that is measured."""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.command_options.inference import HeldDtype
from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError

ROWS, PROMPT_TOKENS, NEW_TOKENS, DTYPES, REPETITIONS = (1, 4, 16), (128, 1024), (64,), ("same",), 5
"""What is measured where an option is not given."""
_MOST_TOKENS = 1 << 20
_HELD = typing.get_args(HeldDtype)


def _counts(at_least: int, at_most: int) -> Callable[[str, str], tuple[int, ...]]:
    """Reads ``1,4,16``: different numbers within bounds."""

    def parse(text: str, flag: str) -> tuple[int, ...]:
        parts = text.split(",")
        numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
        known = len(numbers) == len(parts) == len(set(numbers))
        if not known or not all(at_least <= number <= at_most for number in numbers):
            todo = f"write different numbers from {at_least} to {at_most:,} as 4,16"
            raise SpecError(f"{flag} is {text[:80]!r}", None, todo)
        return tuple(numbers)

    return parse


def _dtypes(text: str, flag: str) -> tuple[str, ...]:
    names = text.split(",")
    if not {*names} <= {*_HELD} or len({*names}) < len(names):
        raise SpecError(f"{flag} is {text[:80]!r}", None, f"write different ones of {', '.join(_HELD)}, with commas")
    return tuple(names)


def _axis(help: str, shown: tuple[Any, ...], parse: Callable[[str, str], Any], metavar: str = "N,N") -> Any:
    default = ",".join(map(str, shown))
    return option(f"--generate: {help}", None, parse=parse, metavar=metavar, shown_default=default, last=True)


@dataclass(frozen=True, kw_only=True)
class GenerationGridOptions(Options):
    """What is measured of generation. None stands for an option that was not given, which can then be refused."""

    generate: bool = option(
        "Measure generation with --model, in place of training steps; a cell for every combination of the options "
        "that follow.",
        False,
        last=True,
    )
    model: Path | None = option(
        "--generate: a model directory, Meta's or Hugging Face's.", None, metavar="DIR", last=True
    )
    adapter: Path | None = option(
        "--generate: an adapter; cells without it and cells with it.", None, metavar="DIR", last=True
    )
    rows: tuple[int, ...] | None = _axis("sequences that run together.", ROWS, _counts(1, 4096))
    prompt_tokens: tuple[int, ...] | None = _axis("of each prompt.", PROMPT_TOKENS, _counts(1, _MOST_TOKENS))
    new_tokens: tuple[int, ...] | None = _axis("that follow each prompt.", NEW_TOKENS, _counts(2, _MOST_TOKENS))
    dtype: tuple[str, ...] | None = _axis(
        f"what weights are held in: {', '.join(_HELD)}.", DTYPES, _dtypes, "DTYPE,DTYPE"
    )
    repetitions: int | None = option(
        "--generate: timed runs of a cell, after one of warm-up.",
        None,
        shown_default=str(REPETITIONS),
        at_least=1,
        last=True,
    )
    device: str | None = option("--generate: auto, cpu, cuda or cuda:N.", None, shown_default="auto", last=True)
    force_base: bool = option("--generate: accept an adapter of another base.", False, last=True)

    def refuse_generation(self) -> None:
        """Raise ``SpecError`` if an option was given that ``--generate`` alone has."""
        for name in GENERATION_OPTIONS:
            if getattr(self, name):
                raise SpecError("it needs --generate", f"--{name.replace('_', '-')}")


GENERATION_OPTIONS = tuple(name for name in GenerationGridOptions.__dataclass_fields__ if name != "generate")
"""Names of the options that say nothing without ``--generate``."""

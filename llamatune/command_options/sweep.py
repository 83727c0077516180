"""Options of ``sweep``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError


def _parse_at_once(text: str, flag: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise SpecError(f"{text!r} is no number of runs", flag, "write auto, or a number from 1 on")
    return int(text)


@dataclass(frozen=True)
class SweepOptions(Options):
    """A run spec, and the values of its fields that are tried. ``at_once`` None: as many as memory allows."""

    spec_path: Path = option("The run spec.", argument=True, metavar="SPEC.yaml")
    overrides: Sequence[str] = option(
        "Changes to it in every run; several values are an axis.", (), argument=True, metavar="KEY=VALUE ..."
    )
    grid: Sequence[str] = option(
        "An axis: a field of the spec and its values, lora=on,off, or batch=1x8,8x1 (micro-batch x accumulation). "
        "Every combination is a run.",
        (),
        metavar="KEY=V1,V2",
    )
    output: Path = option("Where the runs, the table and the page are written.", Path("sweep-output"), writes="run")
    at_once: int | None = option(
        "Runs that share the base and are trained together. 1: one after another.",
        None,
        kind=int,
        metavar="AUTO|N",
        shown_default="auto, as many as memory allows",
        parse=_parse_at_once,
    )
    overwrite: bool = option("Move what is in the way aside.", False)
    force_base: bool = option("Accept a tokenizer or starting adapter made for another base.", False)

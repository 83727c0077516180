"""Options of the verbs about runs: ``train``, ``benchmark``, ``report`` and ``demo``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.generation_grid import GenerationGridOptions
from llamatune.command_options.inference import Sampling, prompt_format_option, prompt_map_option
from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError
from llamatune.units import parse_size


@dataclass(frozen=True)
class TrainOptions(Options):
    """A run spec, and how to begin with it."""

    spec_path: Path = option("The run spec.", argument=True, metavar="SPEC.yaml")
    overrides: Sequence[str] = option(
        "Changes to it, as training.seed=1; lora=null trains every parameter.",
        (),
        argument=True,
        metavar="KEY=VALUE ...",
    )
    resume: Literal["auto", "never"] = option("auto: continue what the run directory holds; never.", "auto")
    dry_run: bool = option("Check and count everything, train nothing.", False)
    overwrite: bool = option("Move what is in the way aside.", False)
    force_base: bool = option("Accept a tokenizer or starting adapter made for another base.", False)
    allow_spec_change: Sequence[str] = option(
        "A field that may differ from the run's, as training.learning_rate.", (), metavar="FIELD"
    )


def _parse_seeds(text: str, flag: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise SpecError(f"{text!r} are no seeds", flag, "write different numbers as 0,1,2")
    return tuple(int(part) for part in parts)


def _parse_work(text: str, flag: str) -> tuple[int, float]:
    rows, _, epochs = text.partition("x")
    try:
        work = int(rows), float(epochs)
    except ValueError:
        work = 0, 0.0
    if work[0] < 1 or not 0 < work[1] < 1e9:
        raise SpecError(f"{text[:80]!r} is no work", flag, "write rows x epochs, as 200x5")
    return work


_BENCHMARK_STEPS = 20


@dataclass(frozen=True)
class BenchmarkOptions(GenerationGridOptions):
    """What is measured: training steps of a run spec, or with ``generate`` generation, which other options say.

    ``preset_grid`` None: ``techniques`` where ``grid`` has no axes, else those axes alone.
    """

    spec_path: Path | None = option("The run spec; none with --generate.", None, argument=True, metavar="SPEC.yaml")
    overrides: Sequence[str] = option(
        "Changes to it in every cell; several values are an axis.", (), argument=True, metavar="KEY=VALUE ..."
    )
    grid: Sequence[str] = option(
        "An axis of the grid: a field of the spec, lora=on,off, or batch=1x1,8x1,1x8 (micro-batch x "
        "accumulation). The first cell is the one that ratios are taken to.",
        (),
        metavar="KEY=V1,V2",
    )
    preset_grid: str | None = option(
        "techniques: LoRA, precision, accumulation and checkpointing on float32 weights (the default without "
        "--grid); checkpointing: every kind of it. --grid then changes its axes.",
        None,
        metavar="NAME",
    )
    steps: int | None = option(
        "Updates in each cell; the first are warm-up and not timed.",
        None,
        metavar="N",
        shown_default=str(_BENCHMARK_STEPS),
        at_least=1,
    )
    epochs: int | None = option("Whole epochs in place of --steps.", None, metavar="N", at_least=1)
    work: tuple[int, float] | None = option(
        "Rows x epochs for which every cell's time is given, as 200x5.",
        None,
        metavar="ROWSXEPOCHS",
        parse=_parse_work,
        shown_default="the data's rows x the spec's epochs",
    )
    seeds: tuple[int, ...] | None = option(
        "Repeat each cell for its losses.", None, metavar="N,N", shown_default="the spec's", parse=_parse_seeds
    )
    memory_limit_bytes: int | None = option(
        "As 40GiB: cells that need more are out of memory.",
        None,
        flag="--memory-limit",
        metavar="SIZE",
        parse=parse_size,
    )
    layout: Literal["flat", "nested"] = option("flat: a line a cell; nested: OFF and ON in lines and columns.", "flat")
    output: Path = option("Where results are written.", Path("benchmark-output"), writes="run")
    overwrite: bool = option("Move what is in the way aside.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.generate:
            self.refuse_generation()
            return
        of_steps = (
            *("spec_path", "overrides", "grid", "preset_grid"),
            *("steps", "epochs", "work", "seeds", "memory_limit_bytes"),
        )
        named = {"spec_path": "SPEC.yaml", "overrides": "KEY=VALUE", "memory_limit_bytes": "--memory-limit"}
        given = [name for name in of_steps if getattr(self, name)] + ["layout"] * (self.layout == "nested")
        if given:
            flag = named.get(given[0], f"--{given[0].replace('_', '-')}")
            raise SpecError(f"{flag} is of training steps, and --generate measures none", None, "leave one of them out")

    @property
    def updates(self) -> int | None:
        """Of each cell; None: as many as the epochs have."""
        return None if self.epochs is not None else self.steps or _BENCHMARK_STEPS


@dataclass(frozen=True)
class ReportOptions(Options):
    """What to report on and where to. ``smoothing`` is the decay of the running average.

    Each run's base and trained weights answer the prompts and the rows; ``generations`` are answers from a file.
    ``charts`` and ``tables`` are directories.
    """

    runs: Sequence[Path] = option(
        "Run directories; several are compared.", argument=True, metavar="RUN...", holds_outputs=True
    )
    output: Path = option("The page, one HTML file that needs nothing else.", writes="file")
    png: Path | None = option("The charts as a picture too.", None, metavar="FILE", writes="file")
    charts: Path | None = option(
        "Each chart too, as PNG, SVG and PDF with title and legend.", None, metavar="DIR", writes="product"
    )
    tables: Path | None = option("Each table too, as Markdown and LaTeX.", None, metavar="DIR", writes="product")
    smoothing: float | None = option(
        "Decay of the moving average; 0 draws none.", None, at_least=0, below=1, shown_default="by length, to 0.9"
    )
    rows: int | None = option(
        "Show each run's answers to N rows inside the training set and N outside.", None, at_least=1, at_most=1000
    )
    seed: int = option("Decides which --rows are drawn.", 0, at_least=0, below=1 << 63)
    prompt: Sequence[str] = option("Show each run's answer before and after tuning. Repeatable.", ())
    prompt_file: Path | None = option("Rows as prepare-data reads them, or one prompt a line.", None, metavar="FILE")
    format: str = prompt_format_option()
    column_map: str | None = prompt_map_option()
    generations: Path | None = option("Show what generate --compare --output wrote.", None, metavar="FILE")
    evaluation: Sequence[Path] = option(
        "Show what evaluate --json printed into this file. Repeatable.", (), metavar="FILE"
    )
    benchmark: Sequence[Path] = option("Show the tables of this directory of benchmark. Repeatable.", (), metavar="DIR")
    max_new_tokens: int = option("The most that is generated.", Sampling.max_new_tokens, at_least=1, at_most=1 << 20)
    device: str = option("What generates: auto, cpu, cuda or cuda:N.", "auto")
    overwrite: bool = option("Replace what stands at --output, --png, --charts and --tables.", False)


@dataclass(frozen=True)
class DemoOptions(Options):
    """Where the demo writes."""

    output: Path = option("Where everything is written.", Path("demo-output"), writes="run")

"""Options of the verbs about runs: ``train``, ``benchmark``, ``plan-memory``, ``report`` and ``demo``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llamatune.errors import SpecError
from llamatune.options.inference import MaxNewTokens, PromptFile, Sampling
from llamatune.options.option import Option, Options
from llamatune.units import parse_size

SpecPath = Annotated[Path, Option("The run spec.", argument=True, metavar="SPEC.yaml")]


@dataclass(frozen=True)
class TrainOptions(Options):
    """A run spec, and how to begin with it."""

    spec_path: SpecPath
    overrides: Annotated[
        Sequence[str], Option("Changes to it, as training.seed=1.", argument=True, metavar="[KEY=VALUE ...]")
    ] = ()
    resume: Annotated[Literal["auto", "never"], Option("auto: continue what the run directory holds; never.")] = "auto"
    dry_run: Annotated[bool, Option("Check and count everything, train nothing.")] = False
    overwrite: Annotated[bool, Option("Move what is in the way aside.")] = False
    force_base: Annotated[bool, Option("Accept a tokenizer or starting adapter made for another base.")] = False
    allow_spec_change: Annotated[
        Sequence[str], Option("A field that may differ from the run's, as training.learning_rate.", metavar="FIELD")
    ] = ()


def _parse_seeds(text: str, flag: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise SpecError(f"{text!r} are no seeds", flag, "write different numbers as 0,1,2")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class BenchmarkOptions(Options):
    """What is measured.

    ``preset_grid`` None: ``techniques`` where ``grid`` has no axes, else those axes alone.
    """

    spec_path: SpecPath
    overrides: Annotated[
        Sequence[str],
        Option("Changes to it in every cell; several values are an axis.", argument=True, metavar="[KEY=VALUE ...]"),
    ] = ()
    grid: Annotated[
        Sequence[str],
        Option(
            "An axis of the grid: a field of the spec, lora=on,off, or batch=1x1,8x1,1x8 (micro-batch x "
            "accumulation). The first cell is the one that ratios are taken to.",
            metavar="KEY=V1,V2",
        ),
    ] = ()
    preset_grid: Annotated[
        str | None,
        Option(
            "techniques: LoRA, precision, accumulation and checkpointing on float32 weights (the default without "
            "--grid); checkpointing: every kind of it. --grid then changes its axes.",
            metavar="NAME",
        ),
    ] = None
    steps: Annotated[
        int,
        Option("Updates in each cell; the first are warm-up and not timed.", metavar="<int range> [x>=1]", at_least=1),
    ] = 20
    epochs: Annotated[
        int | None, Option("Whole epochs in place of --steps.", metavar="<int range> [x>=1]", at_least=1)
    ] = None
    seeds: Annotated[
        tuple[int, ...] | None,
        Option("Repeat each cell for its losses.", metavar="N,N", shown_default="the spec's", parse=_parse_seeds),
    ] = None
    memory_limit_bytes: Annotated[
        int | None,
        Option(
            "As 40GiB: cells that need more are out of memory.", flag="--memory-limit", metavar="SIZE", parse=parse_size
        ),
    ] = None
    layout: Annotated[
        Literal["flat", "nested"], Option("flat: a line a cell; nested: OFF and ON in lines and columns.")
    ] = "flat"
    output: Annotated[Path, Option("Where results are written.")] = Path("benchmark-output")
    overwrite: Annotated[bool, Option("Move what is in the way aside.")] = False


@dataclass(frozen=True)
class PlanMemoryOptions(Options):
    """A run spec or a published shape, changes to it, and the memory that there is."""

    arguments: Annotated[
        Sequence[str],
        Option(
            "A run spec (not with --preset) and changes to it.", argument=True, metavar="[SPEC.yaml] [KEY=VALUE ...]"
        ),
    ] = ()
    preset: Annotated[str | None, Option("A published shape, such as llama-2-7b.", metavar="NAME")] = None
    memory_bytes: Annotated[
        int | None,
        Option(
            "The device's memory, such as 40GiB; 90 % of it is used.", flag="--memory", metavar="SIZE", parse=parse_size
        ),
    ] = None
    device: Annotated[Literal["cuda", "cpu"], Option("cuda, or cpu, where other attention kernels run.")] = "cuda"
    micro_batch_size: Annotated[int | None, Option("Rows in one forward pass.", metavar="N")] = None
    max_seq_length: Annotated[
        int | None,
        Option("Tokens of a row, in place of the prepared data's.", metavar="N", at_least=1, at_most=1 << 20),
    ] = None
    r: Annotated[int | None, Option("Rank of the adapter.", metavar="R")] = None
    target_modules: Annotated[str | None, Option("A comma list, or all-linear.", metavar="NAMES")] = None
    explain: Annotated[bool, Option("Show the moments of the step, and what is alive at its peak.")] = False


@dataclass(frozen=True)
class ReportOptions(Options):
    """What to report on and where to. ``smoothing`` is the decay of the running average.

    Each run's base and trained weights answer the prompts; ``generations`` are answers from a file.
    """

    runs: Annotated[Sequence[Path], Option("Run directories; several are compared.", argument=True, metavar="RUN...")]
    output: Annotated[Path, Option("The page, one HTML file that needs nothing else.")]
    png: Annotated[Path | None, Option("The charts as a picture too.", metavar="FILE")] = None
    smoothing: Annotated[float, Option("Decay of the moving average; 0 draws none.", at_least=0, below=1)] = 0.95
    prompt: Annotated[Sequence[str], Option("Show each run's answer before and after tuning. Repeatable.")] = ()
    prompt_file: PromptFile = None
    generations: Annotated[Path | None, Option("Show what generate --compare --output wrote.")] = None
    max_new_tokens: MaxNewTokens = Sampling.max_new_tokens
    device: Annotated[str, Option("What generates: auto, cpu, cuda or cuda:N.")] = "auto"
    overwrite: Annotated[bool, Option("Replace what stands at --output and --png.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.png is not None and self.png.resolve() == self.output.resolve():
            raise SpecError("--png and --output are the same file", self.output)


@dataclass(frozen=True)
class DemoOptions(Options):
    """Where the demo writes."""

    output: Annotated[Path, Option("Where everything is written.")] = Path("demo-output")

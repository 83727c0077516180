"""Options of ``judge``, and what its ``--require`` may name."""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.inference import LOSS_ROWS, HeldDtype, Placement
from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE

METRICS = (
    "task_loss", "task_perplexity", "task_loss_change", "general_loss", "forgetting", "overlap", "gsm8k_accuracy",
    "gsm8k_change",
)  # fmt: skip
"""Those that need no file of a name; ``gsm8k_*`` need ``--gsm8k``."""

OF_TEXTS = ("loss", "forgetting")
"""Of each file of ``--general``: ``NAME.loss``, where NAME is the file's name without its ending."""

OF_CHOICES = ("acc", "acc_norm", "acc_change", "acc_norm_change")
"""Of each file of ``--choices``."""

_OWN_NAMES = ("task", "packaged", "gsm8k")
"""What is measured without a file of a name is called so in the result."""

_RELATIONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_REQUIREMENT = re.compile(r"\s*([^<>=]+?)\s*(<=|>=|<|>)\s*([^<>=]+?)\s*")


@dataclass(frozen=True)
class Requirement:
    """``task_loss<1.2``: a metric, a relation and a finite bound."""

    metric: str
    relation: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the relation to the bound."""
        held: bool = _RELATIONS[self.relation](value, self.bound)
        return held

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.bound:g}"


def parse_requirements(text: str, flag: str) -> tuple[Requirement, ...]:
    """Requirements between commas."""
    todo = "write METRIC<NUMBER, with <, <=, > or >=, such as task_loss<1.2,forgetting<0.05"
    found = []
    for part in text.split(","):
        match = _REQUIREMENT.fullmatch(part)
        if match is None:
            raise SpecError(f"{part[:80]!r} is no requirement", flag, todo)
        try:
            bound = float(match[3])
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise SpecError(f"{match[3][:80]!r} is no number", flag, todo)
        found.append(Requirement(match[1], match[2], bound))
    return tuple(found)


def file_name(path: Path) -> str:
    """What a file is called in the result: its name without endings, ``arc_easy`` of ``data/arc_easy.jsonl.gz``."""
    return path.name.lstrip(".").partition(".")[0] or path.name


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(Options):
    """A run, what its base and its tuned weights are measured on, and how they are computed.

    What is None is the run's own: its base, its validation rows, its dtype.
    """

    run: Path = option("A training.output_dir of llamatune train.", argument=True, metavar="RUN")
    best: bool = option("Judge the weights of best/ in place of the last ones.", False)
    gsm8k: Path | None = option("A GSM8K file: exact match, greedy and zero-shot.", None, metavar="FILE")
    general: Sequence[Path] = option(
        "A text file, or rows of text: its loss before and after, beside that of the text in the package.",
        (),
        kind=Sequence[Path],
        metavar="FILE",
    )
    choices: Sequence[Path] = option(
        "Multiple-choice rows in the shape of MMLU, HellaSwag or ARC.", (), kind=Sequence[Path], metavar="FILE"
    )
    require: tuple[Requirement, ...] | None = option(
        "Exit with 6 unless these hold, as 'task_loss<1.2,forgetting<0.05'.",
        None,
        parse=parse_requirements,
        metavar="METRIC<NUMBER,...",
    )
    data: Path | None = option(
        "A directory of prepare-data for the task's loss.",
        None,
        metavar="DIR",
        shown_default="the run's validation rows",
    )
    model: Path | None = option(
        "The base, where it is elsewhere now.", None, metavar="DIR", shown_default="the run's model.path"
    )
    plot: Path | None = option("Draw the rank that the adapter uses, a PNG.", None, writes="file")
    per_question: Path | None = option(
        "Also write each choice's log-likelihood to this JSONL file.", None, writes="file"
    )
    overwrite: bool = option("Replace what stands at --plot and --per-question.", False)
    limit: int | None = option("Only the first N rows of each.", None, at_least=1)
    max_new_tokens: int = option("The most of one GSM8K answer.", 512, at_least=1, at_most=1 << 20)
    batch_size: int | None = option(
        "Rows that are computed together.", None, at_least=1,
        shown_default=f"{LOSS_ROWS}; answers {ROWS_AT_ONCE['cpu']}, on a GPU {ROWS_AT_ONCE['cuda']}",
    )  # fmt: skip
    force_base: bool = option("Accept an adapter of another base, or data of another tokenizer.", False, last=True)
    dtype: HeldDtype | None = option(
        "same, float32, bfloat16, float16, nf4, float8 or int8.", None, shown_default="the run's model.dtype", last=True
    )
    device: str = option("auto, cpu, cuda or cuda:N.", "auto", last=True)
    placement: Placement = option("Of the blocks: device or host.", "device", last=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot is not None and self.plot.suffix != ".png":
            raise SpecError("a plot is a .png file", self.plot, "name it so")
        if self.per_question is not None and not self.choices:
            raise SpecError("it needs --choices", "--per-question")
        if self.overwrite and self.plot is None and self.per_question is None:
            raise SpecError("it needs --plot or --per-question", "--overwrite")
        if self.placement == "shard":
            raise SpecError("judge computes in one process", "--placement", "use device or host")
        names = [*_OWN_NAMES, *(file_name(path) for path in (*self.general, *self.choices))]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise SpecError(f"two parts of the result would be called {twice!r}", None, "rename the file")
        self._check_requirements()

    @property
    def loss_rows(self) -> int:
        """Rows whose losses, or choices, are computed together."""
        return self.batch_size or LOSS_ROWS

    def metrics(self) -> dict[str, str]:
        """Every metric that could be required, and the option without which it is not measured, or nothing."""
        known = {name: "--gsm8k" if name.startswith("gsm8k") and self.gsm8k is None else "" for name in METRICS}
        for paths, measured in ((self.general, OF_TEXTS), (self.choices, OF_CHOICES)):
            known |= {f"{file_name(path)}.{name}": "" for path in paths for name in measured}
        return known

    def _check_requirements(self) -> None:
        known = self.metrics()
        for required in self.require or ():
            if required.metric not in known:
                of_files = (".".join(("NAME", name)) for name in (*OF_TEXTS, *OF_CHOICES))
                todo = f"there are {', '.join(known)}; of files {', '.join(dict.fromkeys(of_files))}"
                raise SpecError(f"no metric is called {required.metric[:80]!r}", "--require", todo)
            if needed := known[required.metric]:
                raise SpecError(f"{required.metric} needs {needed}", "--require")

"""Options of ``plan-memory``: for a step of training, and for generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.inference import HeldDtype, Sampling
from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE
from llamatune.units import parse_size

ASSUMED_PROMPT_TOKENS = 512
_OF_TRAINING = ("micro_batch_size", "max_seq_length", "explain")
_OF_GENERATION = ("prompt_tokens", "max_new_tokens", "prompts", "batch_size", "num_beams", "temperature", "dtype",
                  "adapter", "compare")  # fmt: skip


@dataclass(frozen=True)
class PlanMemoryOptions(Options):
    """A run spec or a published shape, changes to it, and the memory that there is.

    None stands for an option that was not given, so that one without effect can be refused.
    """

    arguments: Sequence[str] = option(
        "A run spec (not with --preset) and changes to it; with --generate, a model directory too.",
        (),
        argument=True,
        metavar="[SPEC.yaml] [KEY=VALUE ...]",
    )
    preset: str | None = option("A published shape, such as llama-2-7b.", None, metavar="NAME")
    memory_bytes: int | None = option(
        "The device's memory, such as 40GiB; 90 % of it is used.",
        None,
        flag="--memory",
        metavar="SIZE",
        shown_default="not known; of a CPU what is free here",
        parse=parse_size,
    )
    device: Literal["cuda", "cpu"] | None = option(
        "cuda, or cpu, where other attention kernels run.", None, shown_default="the spec's, or cuda"
    )
    ranks: int = option("Processes, each with a device.", 1, metavar="N", at_least=1, at_most=1 << 16)
    micro_batch_size: int | None = option("Rows in one forward pass.", None, metavar="N")
    max_seq_length: int | None = option(
        "Tokens of a row, in place of the prepared data's.", None, metavar="N", at_least=1, at_most=1 << 20
    )
    r: int | None = option("Rank of the adapter.", None)
    target_modules: str | None = option("A comma list, or all-linear.", None, metavar="NAME,NAME")
    explain: bool = option("Show the moments of the step, and what is alive at its peak.", False)
    generate: bool = option("Plan for generate in place of training.", False)
    prompt_tokens: int | None = option(
        "With --generate: of the longest prompt.",
        None,
        metavar="N",
        at_least=1,
        at_most=1 << 20,
        shown_default=str(ASSUMED_PROMPT_TOKENS),
    )
    max_new_tokens: int | None = option(
        "The most of a completion.", None, metavar="N", at_least=1, at_most=1 << 20,
        shown_default=str(Sampling.max_new_tokens),
    )  # fmt: skip
    prompts: int | None = option(
        "How many there are; each of several sequences counts as one.", None, metavar="N", at_least=1,
        shown_default="more than at once",
    )  # fmt: skip
    batch_size: int | None = option(
        "Completions at once, as of evaluate.", None, metavar="N", at_least=1, at_most=1 << 16,
        shown_default=f"{ROWS_AT_ONCE['cpu']}, on a GPU {ROWS_AT_ONCE['cuda']}, or as many as fit",
    )  # fmt: skip
    num_beams: int | None = option("As of generate.", None, metavar="N", at_least=1, at_most=64, shown_default="1")
    temperature: float | None = option(
        "0 is greedy; else tokens are drawn with --top-p, which takes most.", None, at_least=0,
        below=float("inf"), shown_default=str(Sampling.temperature),
    )  # fmt: skip
    dtype: HeldDtype | None = option(
        "same, float32, bfloat16, float16, nf4, float8 or int8.", None, shown_default="same"
    )
    adapter: Path | None = option("The adapter on the model.", None, metavar="DIR")
    compare: bool = option("With the base's completions beside.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        without = _OF_TRAINING if self.generate else _OF_GENERATION
        given = [name for name in without if getattr(self, name) not in (None, False)]
        if self.generate and self.ranks > 1:
            given.append("ranks")
        if given:
            what = "it is about training, not about --generate" if self.generate else "it needs --generate"
            raise SpecError(what, f"--{given[0].replace('_', '-')}")
        if (self.num_beams or 1) > 1 and (self.batch_size or self.prompts):
            raise SpecError(
                "with --num-beams prompts are completed one at a time", "--batch-size, --prompts", "leave them out"
            )
        if self.adapter is not None and (self.r is not None or self.target_modules is not None):
            raise SpecError("--adapter says the rank and the modules", todo="leave out --r and --target-modules")

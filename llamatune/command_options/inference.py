"""Options of the verbs that compute with a model: what they share, ``evaluate`` and ``merge-lora``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE

LEAST_KEPT = 0.9
_GSM8K_NEW_TOKENS = 512
LOSS_ROWS = 16
"""Rows whose loss is computed together if not otherwise asked for."""

Dtype = Literal["same", "float32", "bfloat16", "float16"]
HeldDtype = Literal["same", "float32", "bfloat16", "float16", "nf4", "float8", "int8"]
Placement = Literal["device", "host", "shard"]


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(Options):
    """Which of several files of weights is read of a model directory."""

    variant: str | None = option(
        "Of a Hugging Face model: fp16 reads model.fp16.safetensors.", None, metavar="NAME", last=True
    )


def parse_weights(text: str, flag: str) -> tuple[float, ...]:
    """``0.7,0.3`` as numbers."""
    try:
        weights = tuple(map(float, text.split(",")))
    except ValueError:
        raise SpecError(f"{flag} is {text[:80]!r}", None, "give a number for each adapter, such as 0.7,0.3") from None
    if not all(map(math.isfinite, weights)):
        raise SpecError(f"{flag} is {text[:80]!r}", None, "its numbers must be finite")
    return weights


def _weights_option() -> Any:
    help = "Of each --adapter's update, in their order, such as 0.7,0.3."
    return option(help, None, parse=parse_weights, shown_default="1 for each", metavar="X,X", last=True)


class _Adapters:
    """Of options that take one adapter or several."""

    adapter: Path | Sequence[Path] | None
    weights: tuple[float, ...] | None

    @property
    def adapters(self) -> tuple[Path, ...]:
        """Their directories, in the order of the command line."""
        if self.adapter is None:
            return ()
        return (self.adapter,) if isinstance(self.adapter, Path) else tuple(self.adapter)

    @property
    def adapter_weights(self) -> tuple[float, ...]:
        """What the update of each is multiplied by."""
        return self.weights or (1.0,) * len(self.adapters)

    def check_weights(self) -> None:
        """Raise ``SpecError`` unless there is a weight for each adapter."""
        if self.weights is not None and len(self.weights) != len(self.adapters):
            what = f"--weights has {len(self.weights)} numbers for {len(self.adapters)} adapters"
            raise SpecError(what, None, "give one for each --adapter, in their order")


@dataclass(frozen=True)
class ModelSource(_Adapters, WeightsOptions):
    """A model to compute with: the base, adapters on it, and whether the base alone is computed beside.

    ``dtype`` is what the weights are held in; ``same``: as they are stored; ``nf4``, ``float8`` and ``int8``: the
    matrices of the blocks in it, the rest in 16 bits. ``placement`` is where those of the blocks lie between uses.
    """

    model: Path = option("A model directory, Meta's or Hugging Face's.", metavar="DIR")
    adapter: Path | Sequence[Path] | None = option(
        "An adapter directory to put on it; of several, the sum.", None, kind=Sequence[Path], metavar="DIR"
    )
    compare: bool = option("Show the base's answer beside the tuned one.", False)
    force_base: bool = option("Accept an adapter of another base.", False, last=True)
    dtype: HeldDtype = option("same, float32, bfloat16, float16, nf4, float8 or int8.", "same", last=True)
    device: str = option("auto, cpu, cuda or cuda:N.", "auto", last=True)
    placement: Placement = option("Of the blocks: device, host, or shard: slices on all ranks.", "device", last=True)
    weights: tuple[float, ...] | None = _weights_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights()
        if self.compare and not self.adapters:
            raise SpecError("--compare needs two models", None, "give the tuned one with --adapter")


@dataclass(frozen=True)
class Drawing(Options):
    """How one completion is drawn, a token at a time: ``temperature`` 0 is greedy."""

    max_new_tokens: int = option("The most that is generated.", 128, at_least=1, at_most=1 << 20)
    temperature: float = option("0 is greedy.", 0.6, at_least=0, below=float("inf"))
    top_k: int | None = option("Draw from the K likeliest tokens.", None, at_least=1)
    top_p: float = option("Draw from the likeliest tokens that reach this probability.", 0.9, above=0, at_most=1)
    min_p: float = option(
        "Draw from tokens of at least this share of the likeliest's probability.", 0.0, at_least=0, at_most=1
    )
    repetition_penalty: float = option(
        "Above 1, tokens of the prompt and the completion become less likely.", 1.0, above=0, below=float("inf")
    )
    seed: int = option("The same seed draws the same text.", 0, at_least=0, below=1 << 63)


@dataclass(frozen=True)
class Sampling(Drawing):
    """How completions are made: ``num_beams`` above 1 is beam search, drawing nothing.

    ``num_return_sequences`` completions are made of each prompt: so many draws, or the best beams.
    """

    num_beams: int = option("Beam search over so many beams.", 1, at_least=1, at_most=64)
    length_penalty: float = option(
        "Beams are compared by log-probability / length ** this.", 1.0, at_least=-100, at_most=100
    )
    num_return_sequences: int = option(
        "Completions of each prompt: draws, or the best beams.", 1, at_least=1, at_most=1024
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        several, flag = self.num_return_sequences, "--num-return-sequences"
        if self.num_beams > 1 and several > self.num_beams:
            raise SpecError(f"{flag} is {several} of {self.num_beams} beams", None, "raise --num-beams")
        if self.num_beams == 1 and several > 1 and self.temperature == 0:
            todo = "raise --temperature, or give --num-beams"
            raise SpecError(f"{flag} is {several}, and a greedy completion is always the same", None, todo)


def prompt_format_option() -> Any:
    """``--format`` of a verb with ``--prompt-file``."""
    return option("Of --prompt-file: auto, alpaca, gsm8k, chat, completion or text.", "auto")


def prompt_map_option() -> Any:
    """``--map`` of a verb with ``--prompt-file``."""
    help = "Columns of --prompt-file that are read as fields, or a preset, as of prepare-data."
    return option(help, None, metavar="FIELD=COLUMN,...|PRESET", flag="--map")


@dataclass(frozen=True)
class PromptOptions(Options):
    """Prompts, and the template that they are put in; None: the one stored with the adapter or merged model."""

    prompt: Sequence[str] = option("A prompt; may be repeated. Without one, standard input is the prompt.", ())
    prompt_file: Path | None = option("Rows as prepare-data reads them, or one prompt a line.", None, metavar="FILE")
    format: str = prompt_format_option()
    column_map: str | None = prompt_map_option()
    template: str | None = option("A template's name or file, or none; default: the one stored with the model.", None)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelSource):
    """What is evaluated on which rows. Without ``task``, ``data`` is a prepared directory; else a file of rows.

    GSM8K answers are greedy; its worked examples (``shots``) are the same before every question: a function of ``seed``
    and the two files. None stands for an option that was not given, so that one without effect can be refused.
    """

    data: Path = option("A directory of prepare-data; with --task, a file of rows.", metavar="DIR|FILE")
    compare: bool = option("Evaluate the base beside the tuned model.", False)
    task: str | None = option(
        "gsm8k: generate answers and score them.", None, metavar="NAME", shown_default="loss on prepared rows"
    )
    split: Literal["train", "validation", "all"] | None = option(
        "Of prepared data: train, validation or all.", None, shown_default="validation, else train"
    )
    per_row: Path | None = option("Also write each prepared row's loss to this JSONL file.", None, writes="file")
    template: str | None = option(
        "Of zero-shot questions: a template's name or file, or none.",
        None,
        shown_default="the one stored with the model, else gsm8k",
    )
    shots: int | None = option("Show N worked examples before each question.", None, at_least=0, at_most=100)
    shots_data: Path | None = option("The file of rows that examples are chosen from.", None, metavar="FILE")
    seed: int | None = option("Decides which examples are shown.", None, shown_default=str(Sampling.seed))
    max_new_tokens: int | None = option("The most of one answer.", None, shown_default=str(_GSM8K_NEW_TOKENS))
    output: Path | None = option(
        "Keep each answer in this JSONL file; the same command continues it.", None, writes="answers"
    )
    overwrite: bool = option("Replace what stands at --per-row or --output.", False)
    limit: int | None = option("Only the first N rows.", None, at_least=1)
    batch_size: int | None = option(
        "Rows that are computed together.", None, at_least=1,
        shown_default=f"{LOSS_ROWS}; answers of gsm8k {ROWS_AT_ONCE['cpu']}, on a GPU {ROWS_AT_ONCE['cuda']}",
    )  # fmt: skip
    force_base: bool = option("Accept an adapter of another base, or data of another tokenizer.", False, last=True)

    def __post_init__(self) -> None:
        if self.task not in (None, "gsm8k"):
            todo = "there is gsm8k; without it the data is a prepared directory"
            raise SpecError(f"no task is called {self.task!r}", "--task", todo)
        of_gsm8k = ("template", "shots", "shots_data", "seed", "max_new_tokens", "output")
        for name in of_gsm8k if self.task is None else ("split", "per_row"):
            if getattr(self, name) is not None:
                needs = "it needs --task gsm8k" if self.task is None else "it needs prepared data, without --task"
                raise SpecError(needs, f"--{name.replace('_', '-')}")
        if self.overwrite and self.per_row is None and self.output is None:
            raise SpecError("it needs --per-row or --output", "--overwrite")
        super().__post_init__()
        _ = self.sampling  # which checks its own bounds
        if bool(self.shots) != (self.shots_data is not None):
            raise SpecError("--shots and --shots-data belong together", None, "give both, or neither")
        if self.shots and self.template is not None:
            todo = "few-shot prompts have a form of their own"
            raise SpecError("--template and --shots exclude each other", None, todo)

    @property
    def loss_rows(self) -> int:
        """Rows whose loss is computed together."""
        return self.batch_size or LOSS_ROWS

    @property
    def sampling(self) -> Sampling:
        """Of GSM8K answers: greedy. The seed chooses the worked examples."""
        new_tokens = _GSM8K_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(new_tokens, temperature=0, seed=self.seed or Sampling.seed)


@dataclass(frozen=True)
class MergeOptions(_Adapters, WeightsOptions):
    """What to merge, and how to write it; ``same`` means as the base has it.

    ``template`` None: that stored with the adapters.
    """

    model: Path = option("The base model, Hugging Face's or Meta's.", metavar="DIR")
    adapter: Path | Sequence[Path] = option(
        "The adapter, a PEFT directory; of several, the sum.", kind=Sequence[Path], metavar="DIR"
    )
    output: Path = option("The model directory to make.", metavar="DIR", writes="product")
    format: Literal["same", "hf", "meta"] = option("same, hf or meta: the layout of the files.", "same")
    dtype: Dtype = option("same, float32, bfloat16 or float16: of the weights.", "same")
    force_base: bool = option("Accept an adapter that was trained on another base.", False)
    overwrite: bool = option("Replace what stands at --output.", False)
    weights: tuple[float, ...] | None = _weights_option()
    template: str | None = option(
        "A template's name or file to store with the model, or none.",
        None,
        shown_default="the one stored with the adapter",
    )
    onto_quantized: bool = option("Merge into the weights of the quantised base that training saw.", False)
    probe: Path | None = option(
        "Prove the merge on these rows: prepared, a file, or `run`: those the adapter's run validated on.",
        None,
        metavar="DIR|FILE",
    )
    least_kept: float | None = option(
        "The least share of the gain on --probe that is not refused.",
        None,
        at_most=1,
        shown_default=str(LEAST_KEPT),
    )
    device: str | None = option("Where --probe is computed: auto, cpu, cuda or cuda:N.", None, shown_default="auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights()
        for name in ("least_kept", "device"):
            if self.probe is None and getattr(self, name) is not None:
                raise SpecError("it needs --probe", f"--{name.replace('_', '-')}")

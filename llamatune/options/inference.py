"""Options of the verbs that read a model: ``generate``, ``evaluate``, ``merge-lora``, ``count-params``, ``verify``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llamatune.errors import SpecError
from llamatune.options.option import Option, Options

DEFAULT_RANK = 16
DEFAULT_TARGET_MODULES = "q_proj,v_proj"
_GSM8K_NEW_TOKENS = 512

Dtype = Literal["same", "float32", "bfloat16", "float16"]
PromptFile = Annotated[Path | None, Option("One prompt a line, or rows in JSON or JSON Lines.")]
MaxNewTokens = Annotated[int, Option("The most that is generated.", at_least=1, at_most=1 << 20)]


@dataclass(frozen=True)
class ModelSource(Options):
    """A model to compute with: the base, the adapter on it, and whether the base alone is computed beside the two.

    ``dtype`` is what the weights are held in; ``same``: as they are stored.
    """

    model: Annotated[Path, Option("A model directory, Meta's or Hugging Face's.")]
    adapter: Annotated[Path | None, Option("An adapter directory to put on it.")] = None
    compare: Annotated[bool, Option("Show the base's answer beside the tuned one.")] = False
    force_base: Annotated[bool, Option("Accept an adapter of another base.", last=True)] = False
    dtype: Annotated[Dtype, Option("same, float32, bfloat16 or float16.", last=True)] = "same"
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N.", last=True)] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.adapter is None:
            raise SpecError("--compare needs two models", None, "give the tuned one with --adapter")


@dataclass(frozen=True)
class Sampling(Options):
    """How completions are drawn: ``temperature`` 0 is greedy, ``num_beams`` above 1 is beam search, drawing nothing."""

    max_new_tokens: MaxNewTokens = 128
    temperature: Annotated[float, Option("0 is greedy.", at_least=0, below=float("inf"))] = 0.6
    top_k: Annotated[int | None, Option("Draw from the K likeliest tokens.", at_least=1)] = None
    top_p: Annotated[
        float, Option("Draw from the likeliest tokens that reach this probability.", above=0, at_most=1)
    ] = 0.9
    num_beams: Annotated[int, Option("Beam search over so many beams.", at_least=1, at_most=64)] = 1
    seed: Annotated[int, Option("The same seed draws the same text.", at_least=0, below=1 << 63)] = 0


@dataclass(frozen=True)
class PromptOptions(Options):
    """Prompts, and the template that they are put in; None: the one stored with the adapter or merged model."""

    prompt: Annotated[
        Sequence[str], Option("A prompt; may be repeated. Without one, standard input is the prompt.")
    ] = ()
    prompt_file: PromptFile = None
    template: Annotated[
        str | None, Option("A template's name or file, or none; default: the one stored with the model.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling, PromptOptions, ModelSource):
    """A model, prompts and how to sample. The options of the last base are listed first, as in every dataclass."""

    output: Annotated[Path | None, Option("Also write the results to this JSONL file.")] = None
    overwrite: Annotated[bool, Option("Replace what stands at --output.")] = False


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelSource):
    """What is evaluated on which rows. Without ``task``, ``data`` is a prepared directory; else a file of rows.

    GSM8K answers are greedy; its worked examples (``shots``) are the same before every question: a function of ``seed``
    and the two files. None stands for an option that was not given, so that one without effect can be refused.
    """

    data: Annotated[Path, Option("A directory of prepare-data; with --task, a file of rows.")]
    compare: Annotated[bool, Option("Evaluate the base beside the tuned model.")] = False
    task: Annotated[
        str | None, Option("gsm8k: generate answers and score them.", shown_default="loss on prepared rows")
    ] = None
    split: Annotated[
        Literal["train", "validation", "all"] | None,
        Option("Of prepared data: train, validation or all.", shown_default="validation, else train"),
    ] = None
    per_row: Annotated[Path | None, Option("Also write each prepared row's loss to this JSONL file.")] = None
    template: Annotated[
        str | None,
        Option(
            "Of zero-shot questions: a template's name or file, or none.",
            shown_default="the one stored with the model, else gsm8k",
        ),
    ] = None
    shots: Annotated[int | None, Option("Show N worked examples before each question.", at_least=0, at_most=100)] = None
    shots_data: Annotated[Path | None, Option("The file of rows that examples are chosen from.")] = None
    seed: Annotated[int | None, Option("Decides which examples are shown.", shown_default=str(Sampling.seed))] = None
    max_new_tokens: Annotated[int | None, Option("The most of one answer.", shown_default=str(_GSM8K_NEW_TOKENS))] = (
        None
    )
    output: Annotated[Path | None, Option("Keep each answer in this JSONL file; the same command continues it.")] = None
    overwrite: Annotated[bool, Option("Replace what stands at --per-row or --output.")] = False
    limit: Annotated[int | None, Option("Only the first N rows.", at_least=1)] = None
    batch_size: Annotated[int, Option("Rows that are computed together.", at_least=1)] = 16
    force_base: Annotated[
        bool, Option("Accept an adapter of another base, or data of another tokenizer.", last=True)
    ] = False

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
            raise SpecError(
                "--template and --shots exclude each other", None, "few-shot prompts have a form of their own"
            )

    @property
    def sampling(self) -> Sampling:
        """Of GSM8K answers: greedy. The seed chooses the worked examples."""
        new_tokens = _GSM8K_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(new_tokens, temperature=0, seed=self.seed or Sampling.seed)


@dataclass(frozen=True)
class MergeOptions(Options):
    """What to merge, and how to write it; ``same`` means as the base has it."""

    model: Annotated[Path, Option("The base model, Hugging Face's or Meta's.", metavar="DIR")]
    adapter: Annotated[Path, Option("The adapter, a PEFT directory.", metavar="DIR")]
    output: Annotated[Path, Option("The model directory to make.", metavar="DIR")]
    format: Annotated[
        Literal["same", "hf", "meta"], Option("same, hf or meta: the layout of the files.", metavar="FORMAT")
    ] = "same"
    dtype: Annotated[Dtype, Option("same, float32, bfloat16 or float16: of the weights.", metavar="DTYPE")] = "same"
    force_base: Annotated[bool, Option("Accept an adapter that was trained on another base.")] = False
    overwrite: Annotated[bool, Option("Replace what stands at --output.")] = False


@dataclass(frozen=True)
class CountOptions(Options):
    """A model or a published shape, and the adapter that is counted with it."""

    model: Annotated[Path | None, Option("A model directory.", metavar="DIR")] = None
    preset: Annotated[str | None, Option("A published shape, such as llama-2-7b.", metavar="NAME")] = None
    r: Annotated[
        int | None,
        Option("Rank of the adapter.", metavar="R", shown_default=str(DEFAULT_RANK), at_least=1, at_most=1 << 16),
    ] = None
    target_modules: Annotated[
        str | None, Option("A comma list, or all-linear.", metavar="NAMES", shown_default=DEFAULT_TARGET_MODULES)
    ] = None
    adapter: Annotated[Path | None, Option("Take rank and modules from an adapter.", metavar="DIR")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.preset is None):
            raise SpecError("give one of --model and --preset", todo="for example --preset llama-2-7b")
        if self.adapter is not None and (self.r is not None or self.target_modules is not None):
            raise SpecError("--adapter says the rank and the modules", todo="leave out --r and --target-modules")


@dataclass(frozen=True)
class VerifyOptions(Options):
    """What is checked."""

    directory: Annotated[
        Path,
        Option(
            "A run, checkpoint, adapter, model or prepared directory, or a cache of quantised weights.",
            argument=True,
            metavar="DIR",
        ),
    ]

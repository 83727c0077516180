"""Options of ``prepare-data``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llamatune.errors import SpecError
from llamatune.options.option import Option, Options


@dataclass(frozen=True)
class PrepareOptions(Options):
    """What ``prepare-data`` reads, how it encodes it, and where it writes."""

    rows: Annotated[Sequence[Path], Option("JSON Lines files or JSON lists of rows.", argument=True, metavar="ROWS...")]
    tokenizer: Annotated[Path, Option("A SentencePiece tokenizer.model, or a directory that holds one.")]
    output: Annotated[Path, Option("The directory to make.")]
    format: Annotated[str, Option("auto, alpaca, gsm8k, chat, completion or text.", metavar="NAME")] = "auto"
    template: Annotated[
        str | None,
        Option(
            "alpaca, gsm8k, llama2-chat, completion, text, or a YAML file with `prompt`.",
            metavar="NAME|FILE",
            shown_default="the format's own",
        ),
    ] = None
    max_seq_length: Annotated[
        int, Option("Tokens of a row at most, BOS and EOS included.", at_least=2, at_most=1 << 30)
    ] = 512
    overlong: Annotated[
        Literal["truncate", "drop", "error"], Option("Rows beyond that: truncate, drop or error.", metavar="POLICY")
    ] = "truncate"
    validation_fraction: Annotated[
        float | None, Option("Hold out about this share of the rows; 0: none.", metavar="F", at_least=0, below=1)
    ] = None
    validation: Annotated[Sequence[Path], Option("A file of validation rows. Repeatable.", metavar="ROWS")] = ()
    limit: Annotated[int | None, Option("Read only the first N rows.", metavar="N", at_least=1, at_most=1 << 62)] = None
    seed: Annotated[int, Option("Decides which rows are held out.", at_least=0, below=1 << 63)] = 0
    train_on_prompt: Annotated[bool, Option("Prompt tokens are learned too, not only the completion.")] = False
    skip_bad_rows: Annotated[
        int, Option("Leave out up to N unusable rows; one more is an error.", metavar="N", at_least=0, at_most=1 << 62)
    ] = 0
    gsm8k_annotations: Annotated[
        Literal["keep", "strip"], Option("Calculator notes such as <<48/2=24>>: keep or strip.", metavar="POLICY")
    ] = "keep"
    preview: Annotated[
        int, Option("Show the first N training rows, token by token.", metavar="N", at_least=0, at_most=1 << 30)
    ] = 0
    show_ids: Annotated[bool, Option("Token ids in the preview too.")] = False
    overwrite: Annotated[bool, Option("Replace what stands at --output.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows:
            raise SpecError("no row files", None, "give at least one JSON or JSONL file")
        if self.validation_fraction and self.validation:
            raise SpecError("--validation-fraction and --validation exclude each other", None, "give one of them")

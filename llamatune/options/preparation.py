"""Options of ``prepare-data``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from llamatune.errors import SpecError
from llamatune.options.option import Option, Options


@dataclass(frozen=True)
class PrepareOptions(Options):
    """What ``prepare-data`` reads, how it encodes it, and where it writes."""

    rows: Annotated[
        Sequence[Path],
        Option(argument=True, metavar="ROWS...", help="JSON Lines files or JSON lists of rows."),
    ]
    tokenizer: Annotated[Path, Option(help="A SentencePiece tokenizer.model, or a directory that holds one.")]
    output: Annotated[Path, Option(help="The directory to make.")]
    format: Annotated[str, Option(metavar="NAME", help="auto, alpaca, gsm8k, chat, completion or text.")] = "auto"
    template: Annotated[
        str | None,
        Option(
            metavar="NAME|FILE",
            help="alpaca, gsm8k, llama2-chat, completion, text, or a YAML file with `prompt`.",
            shown_default="the format's own",
        ),
    ] = None
    max_seq_length: Annotated[
        int, Option(help="Tokens of a row at most, BOS and EOS included.", at_least=2, at_most=1 << 30)
    ] = 512
    overlong: Annotated[
        Literal["truncate", "drop", "error"],
        Option(metavar="POLICY", help="Rows beyond that: truncate, drop or error."),
    ] = "truncate"
    validation_fraction: Annotated[
        float | None, Option(metavar="F", help="Hold out about this share of the rows; 0: none.", at_least=0, below=1)
    ] = None
    validation: Annotated[Sequence[Path], Option(metavar="ROWS", help="A file of validation rows. Repeatable.")] = ()
    limit: Annotated[
        int | None, Option(metavar="N", help="Read only the first N rows.", at_least=1, at_most=1 << 62)
    ] = None
    seed: Annotated[int, Option(help="Decides which rows are held out.", at_least=0, below=1 << 63)] = 0
    train_on_prompt: Annotated[bool, Option(help="Prompt tokens are learned too, not only the completion.")] = False
    skip_bad_rows: Annotated[
        int,
        Option(metavar="N", help="Leave out up to N unusable rows; one more is an error.", at_least=0, at_most=1 << 62),
    ] = 0
    gsm8k_annotations: Annotated[
        Literal["keep", "strip"],
        Option(metavar="POLICY", help="Calculator notes such as <<48/2=24>>: keep or strip."),
    ] = "keep"
    preview: Annotated[
        int, Option(metavar="N", help="Show the first N training rows, token by token.", at_least=0, at_most=1 << 30)
    ] = 0
    show_ids: Annotated[bool, Option(help="Token ids in the preview too.")] = False
    overwrite: Annotated[bool, Option(help="Replace what stands at --output.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows:
            raise SpecError("no row files", None, "give at least one JSON or JSONL file")
        if self.validation_fraction and self.validation:
            raise SpecError("--validation-fraction and --validation exclude each other", None, "give one of them")

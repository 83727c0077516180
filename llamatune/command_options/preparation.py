"""Options of ``prepare-data``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.option import Options, option
from llamatune.errors import SpecError


@dataclass(frozen=True)
class PrepareOptions(Options):
    """What ``prepare-data`` reads, how it encodes it, and where it writes."""

    rows: Sequence[Path] = option(
        "Files of rows: JSON, JSON Lines, CSV, Parquet, text, or compressed; a directory of save_to_disk; - is "
        "standard input. FILE:0.5 takes half of a file's rows, FILE:2 each of them twice.",
        argument=True,
        metavar="ROWS...",
        weighted=True,
    )
    tokenizer: Path = option("A tokenizer.model or tokenizer.json, or a directory that holds one.", metavar="DIR|FILE")
    output: Path = option("The directory to make.", writes="product")
    format: str = option("auto, alpaca, gsm8k, chat, completion or text.", "auto")
    column_map: str | None = option(
        "Columns that are read as fields, such as instruction=query,output=response; or a preset: dolly, openorca and "
        "others that docs/data.md lists.",
        None,
        metavar="FIELD=COLUMN,...|PRESET",
        flag="--map",
    )
    template: str | None = option(
        "alpaca, gsm8k, completion, text; for chats llama2-chat, llama3-chat, chatml or model (the one beside the "
        "tokenizer); or a YAML file with `prompt`, or a .jinja file.",
        None,
        shown_default="the format's own",
    )
    max_seq_length: int = option("Tokens of a row at most, BOS and EOS included.", 512, at_least=2, at_most=1 << 30)
    overlong: Literal["truncate", "drop", "error", "split"] = option(
        "Rows beyond that: truncate, drop, error, or split text rows into windows.", "truncate"
    )
    stride: int = option(
        "Of --overlong split: tokens that a window repeats of the one before, as context.",
        0,
        metavar="N",
        at_least=0,
        at_most=1 << 30,
    )
    validation_fraction: float | None = option(
        "Hold out about this share of the rows; 0: none.", None, at_least=0, below=1
    )
    validation: Sequence[Path] = option("A file of validation rows. Repeatable.", (), metavar="ROWS")
    limit: int | None = option("Read only the first N rows.", None, metavar="N", at_least=1, at_most=1 << 62)
    seed: int = option("Decides which rows are held out, and which ones a weight takes.", 0, at_least=0, below=1 << 63)
    train_on: Literal["all-assistant", "last-assistant"] | None = option(
        "Of a chat: every answer, or the last one, is learned.",
        None,
        shown_default="all-assistant, if the template ends each of them",
    )
    train_on_prompt: bool = option("Prompt tokens are learned too, not only the completion.", False)
    skip_bad_rows: int = option(
        "Leave out up to N unusable rows; one more is an error.", 0, metavar="N", at_least=0, at_most=1 << 62
    )
    gsm8k_annotations: Literal["keep", "strip"] = option("Calculator notes such as <<48/2=24>>: keep or strip.", "keep")
    preview: int = option(
        "Show the first N training rows: their fields, and the text that is trained.",
        0,
        metavar="N",
        at_least=0,
        at_most=1 << 30,
    )
    show_ids: bool = option("Tokens with their ids in the preview too.", False)
    overwrite: bool = option("Replace what stands at --output.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows:
            raise SpecError("no row files", None, "give at least one file, or - for standard input")
        if self.stride and self.overlong != "split":
            raise SpecError("--stride is for --overlong split", None, "add it, or leave --stride out")
        if self.validation_fraction and self.validation:
            raise SpecError("--validation-fraction and --validation exclude each other", None, "give one of them")

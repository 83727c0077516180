"""Options of the verbs that change formats: ``convert``, ``convert-adapter`` and ``extract-lora``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamatune.command_options.inference import WeightsOptions
from llamatune.command_options.inspection import DEFAULT_RANK
from llamatune.command_options.option import Options, Writes, option
from llamatune.errors import SpecError
from llamatune.units import parse_size

_GGUF = ".gguf"


def _is_file(output: Path) -> bool:
    return output.suffix.lower() == _GGUF


def _written(output: Path) -> Writes:
    return "file" if _is_file(output) else "product"


@dataclass(frozen=True)
class ConvertOptions(WeightsOptions):
    """What to convert, and how to write it; ``same`` means as the model has it."""

    model: Path = option("A model directory, Hugging Face's or Meta's, or a GGUF file.", metavar="DIR|FILE")
    output: Path = option("The model directory, or the .gguf file, to make.", metavar="DIR|FILE", writes=_written)
    format: Literal["hf", "meta", "gguf"] | None = option(
        "hf, meta or gguf.", None, shown_default="gguf for a .gguf file, else hf"
    )
    dtype: Literal["same", "float32", "bfloat16", "float16", "q8_0"] = option(
        "same, float32, bfloat16, float16 or, in GGUF, q8_0: of the weights.", "same"
    )
    shards: int | None = option("Cut the weights into N files.", None, metavar="N", at_least=1, at_most=1000)
    shard_bytes: int | None = option(
        "The most of one file, as 5GB; of hf alone.",
        None,
        flag="--shard-size",
        metavar="SIZE",
        shown_default="5GB",
        parse=parse_size,
    )
    overwrite: bool = option("Replace what stands at --output.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if _is_file(self.output) and self.target != "gguf":
            raise SpecError(f"--output is a .gguf file and --format {self.target}", self.output, "give a directory")
        if self.dtype == "q8_0" and self.target != "gguf":
            raise SpecError("--dtype q8_0 is of GGUF alone", None, "name a .gguf file as --output")
        if self.shards is not None and self.shard_bytes is not None:
            raise SpecError("--shards and --shard-size exclude each other", None, "give one of them")
        if self.target == "gguf" and (self.shards or self.shard_bytes):
            raise SpecError("a GGUF file is written whole", None, "leave out --shards and --shard-size")
        if self.target == "meta" and self.shard_bytes:
            raise SpecError("--shard-size is of hf alone", None, "Meta's shards split each matrix: give --shards")

    @property
    def target(self) -> Literal["hf", "meta", "gguf"]:
        """The format that is written."""
        return self.format or ("gguf" if _is_file(self.output) else "hf")

    @property
    def writes_file(self) -> bool:
        """Whether the output is one file, not a directory."""
        return _is_file(self.output)


@dataclass(frozen=True)
class ConvertAdapterOptions(Options):
    """An adapter, and the layout that it is written in."""

    adapter: Path = option("The adapter directory, PEFT's, llamatune's or mlx-lm's.", metavar="DIR")
    output: Path = option("The adapter directory, or the .gguf file, to make.", metavar="DIR|FILE", writes=_written)
    format: Literal["peft", "mlx", "gguf"] | None = option(
        "peft, mlx or gguf.", None, shown_default="gguf for a .gguf file, else peft"
    )
    model: Path | None = option(
        "The base model; gguf and mlx need it.", None, metavar="DIR", shown_default="the one that the adapter names"
    )
    overwrite: bool = option("Replace what stands at --output.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if _is_file(self.output) != (self.target == "gguf"):
            todo = "name a .gguf file" if self.target == "gguf" else "name a directory, or choose --format gguf"
            raise SpecError(f"--format {self.target} and this --output do not belong together", self.output, todo)

    @property
    def target(self) -> Literal["peft", "mlx", "gguf"]:
        """The layout that is written."""
        return self.format or ("gguf" if _is_file(self.output) else "peft")


@dataclass(frozen=True)
class ExtractOptions(Options):
    """Two models of one shape, and the adapter that is to lead from one to the other."""

    base: Path = option("The model that tuning began with.", metavar="DIR")
    tuned: Path = option("The tuned model.", metavar="DIR")
    output: Path = option("The adapter directory to make.", metavar="DIR", writes="product")
    r: int = option("Rank of the adapter.", DEFAULT_RANK, at_least=1, at_most=1 << 16)
    target_modules: str | None = option(
        "A comma list of linear layers.", None, metavar="NAME,NAME", shown_default="those that differ"
    )
    plot: Path | None = option(
        "Draw the retained energy by layer and rank, a PNG.", None, metavar="FILE", writes="file"
    )
    overwrite: bool = option("Replace what stands at --output and --plot.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot is not None and self.plot.suffix != ".png":
            raise SpecError("a plot is a .png file", self.plot, "name it so")

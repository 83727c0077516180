"""Options of the verbs that look at what is stored: ``count-params`` and ``verify``."""

from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.inference import WeightsOptions
from llamatune.command_options.option import option
from llamatune.errors import SpecError

DEFAULT_RANK = 16
DEFAULT_TARGET_MODULES = "q_proj,v_proj"


@dataclass(frozen=True)
class CountOptions(WeightsOptions):
    """A model or a published shape, and the adapter that is counted with it."""

    model: Path | None = option("A model directory.", None, metavar="DIR")
    preset: str | None = option("A published shape, such as llama-2-7b.", None, metavar="NAME")
    r: int | None = option("Rank of the adapter.", None, shown_default=str(DEFAULT_RANK), at_least=1, at_most=1 << 16)
    target_modules: str | None = option(
        "A comma list, or all-linear.", None, metavar="NAME,NAME", shown_default=DEFAULT_TARGET_MODULES
    )
    adapter: Path | None = option("Take rank and modules from an adapter.", None, metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.preset is None):
            raise SpecError("give one of --model and --preset", todo="for example --preset llama-2-7b")
        if self.adapter is not None and (self.r is not None or self.target_modules is not None):
            raise SpecError("--adapter says the rank and the modules", todo="leave out --r and --target-modules")
        if self.preset is not None and self.variant is not None:
            raise SpecError("--variant needs --model", todo="a preset has no weights")


@dataclass(frozen=True)
class VerifyOptions(WeightsOptions):
    """What is checked."""

    directory: Path = option(
        "A run, checkpoint, adapter, model or prepared directory, or a cache of quantised weights.",
        argument=True,
        metavar="DIR",
    )

"""Parameters in closed form, from a configuration alone. No torch, no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamatune.model.config import LINEAR_MODULES, LlamaConfig, linear_path


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model holds and how many of them are trained.

    ``modules`` maps a module's name within the model (blocks summed) to its base and adapter parameters.
    """

    base_parameters: int
    trainable_parameters: int
    modules: Mapping[str, Mapping[str, int]]

    @property
    def total_parameters(self) -> int:
        """Base plus adapter; a model that trains every parameter has no adapter."""
        return self.base_parameters + sum(facts["adapter"] for facts in self.modules.values())

    @property
    def trainable_percent(self) -> float:
        return 100 * self.trainable_parameters / self.total_parameters

    @property
    def reduction_percent(self) -> float:
        """By how much LoRA lowers the number of trained parameters against training all of the base."""
        return 100 * (1 - self.trainable_parameters / self.base_parameters)

    def familiar_line(self) -> str:
        """The line that PEFT users know."""
        return (
            f"trainable params: {self.trainable_parameters:,} || all params: {self.total_parameters:,} "
            f"|| trainable%: {self.trainable_percent:.2f}"
        )


def count_parameters(config: LlamaConfig, r: int | None = None, targets: Iterable[str] = ()) -> ParameterCount:
    """Count a model with LoRA of rank ``r`` on ``targets`` (a matrix out x in gains r * (out + in)), or all of it."""
    chosen = set(targets) if r is not None else set()
    modules: dict[str, dict[str, int]] = {}
    for name, shape in config.parameter_shapes():
        module = name.removesuffix(".weight").split(".", 3)[-1] if ".layers." in name else name.removesuffix(".weight")
        modules.setdefault(module, {"base": 0, "adapter": 0})["base"] += math.prod(shape)
    for target in LINEAR_MODULES:
        if target in chosen and r is not None:
            adapter = r * sum(config.linear_shape(target)) * config.num_hidden_layers
            modules[linear_path(target)]["adapter"] = adapter
    base = sum(facts["base"] for facts in modules.values())
    adapter = sum(facts["adapter"] for facts in modules.values())
    return ParameterCount(base, base if r is None else adapter, modules)

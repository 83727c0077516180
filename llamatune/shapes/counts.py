"""Parameters in closed form, from a configuration alone. No torch, no weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LlamaConfig, linear_path


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


@functools.cache
def count_parameters(
    config: LlamaConfig, adapter: AdapterSpec | None = None, others: tuple[tuple[str, int], ...] = ()
) -> ParameterCount:
    """Count a model with an adapter, or without one, when every parameter is trained.

    ``others``: modules with the parameters that the adapter holds of them beside updates of the blocks' matrices.
    """
    modules: dict[str, dict[str, int]] = {}
    for name, shape in config.parameter_shapes():
        module = _within_block(name.rpartition(".")[0])
        modules.setdefault(module, {"base": 0, "adapter": 0})["base"] += math.prod(shape)
    base = sum(facts["base"] for facts in modules.values())
    if adapter is None:
        return ParameterCount(base, base, modules)
    trained, layers = 0, range(config.num_hidden_layers)
    for module in adapter.modules:
        modules[linear_path(module)]["adapter"] = sum(adapter.parameter_count(config, module, n) for n in layers)
        trained += sum(adapter.trained_count(config, module, n) for n in layers)
    whole = ((name.removesuffix(".weight"), math.prod(shape)) for name, shape in adapter.whole_shapes(config).items())
    for path, parameters in (*whole, *others):
        modules.setdefault(_within_block(path), {"base": 0, "adapter": 0})["adapter"] += parameters
        trained += parameters
    return ParameterCount(base, trained, modules)


def _within_block(path: str) -> str:
    """A module's name in its block, or in the model if it is in none."""
    return path.split(".", 3)[-1] if ".layers." in path else path

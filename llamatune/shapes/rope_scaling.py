"""How a model's rotary angles are stretched beyond the context of its pretraining: a record for each kind. No torch.

The fields are named as Hugging Face's configurations name them; ``model.rope`` computes the angles.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from llamatune.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """A kind of scaling; each is a subclass. ``factor`` is by how much the context grows."""

    kind: ClassVar[str]

    factor: float

    def facts(self) -> dict[str, Any]:
        """What the configuration states of it, but for its kind; what it leaves open is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __post_init__(self) -> None:
        for name, value in self.facts().items():
            least = 1.0 if name == "factor" or "original" in name else 0.0
            if not isinstance(value, bool) and not least <= value < 1e12:
                raise CheckpointError(f"{name} of the rope type {self.kind!r} is {value!r}, which is impossible")


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023, eq. 4): every position is divided by ``factor``."""

    kind = "linear"


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """NTK-aware scaling by the length of the sequence (Peng et al. 2023, section 3.3): theta grows beyond the context.

    A sample of T tokens, more than the context of L, is turned with theta · (factor · T / L - factor + 1)^(E / (E-2)).
    """

    kind = "dynamic"
    context: int
    """L, which configurations state as ``max_position_embeddings`` of the model."""

    def facts(self) -> dict[str, Any]:
        return {"factor": self.factor}


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1's rule (Grattafiori et al. 2024; ``apply_scaling`` of its code): long waves are stretched.

    Waves shorter than ``original / high_freq_factor`` tokens stay, longer ones than ``original / low_freq_factor`` are
    stretched by ``factor``, and between the two the frequencies are interpolated.
    """

    kind = "llama3"
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_freq_factor >= self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise CheckpointError(f"low_freq_factor {low} is not less than high_freq_factor {high}")


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4): a ramp over the dimensions, and larger cos and sin.

    Dimensions that turn more than ``beta_fast`` times within the original context stay, those that turn less than
    ``beta_slow`` times are divided by ``factor``. ``truncate`` rounds the ramp's ends to whole dimensions.
    """

    kind = "yarn"
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by, so that logits grow by its square (Peng et al. 2023, eq. 22)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0  # 1 where the factor is 1

    def ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
        """The pairs of dimensions between which the ramp lies."""

        def pair_turning(turns: float) -> float:
            original = self.original_max_position_embeddings
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_turning(self.beta_fast or 32.0), pair_turning(self.beta_slow or 1.0)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high


ROPE_TYPES: dict[str, type[RopeScaling]] = {
    kind.kind: kind for kind in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}
"""By the names that configurations use."""

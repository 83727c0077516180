"""LlamaConfig: the hyper-parameters of a model of the LLaMA family and the shapes of its tensors. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from llamatune.errors import CheckpointError, SpecError
from llamatune.shapes.rope_scaling import DynamicScaling, RopeScaling, YarnScaling

QKV_MODULES, GATE_UP_MODULES = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ATTENTION_MODULES = (*QKV_MODULES, "o_proj")
FEED_FORWARD_MODULES = (*GATE_UP_MODULES, "down_proj")
LINEAR_MODULES = ATTENTION_MODULES + FEED_FORWARD_MODULES
"""The seven linear layers of a block, in Hugging Face's names and order: what LoRA may target."""

QUERY_SIZE, KEY_SIZE = "num_attention_heads x head_dim", "num_key_value_heads x head_dim"
LINEAR_SIZES = {
    "q_proj": (QUERY_SIZE, "hidden_size"), "k_proj": (KEY_SIZE, "hidden_size"), "v_proj": (KEY_SIZE, "hidden_size"),
    "o_proj": ("hidden_size", QUERY_SIZE), "gate_proj": ("intermediate_size", "hidden_size"),
    "up_proj": ("intermediate_size", "hidden_size"), "down_proj": ("hidden_size", "intermediate_size"),
}  # fmt: skip
"""What ``(out, in)`` of each are, in the words of a configuration."""

_LARGEST = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 1024, "vocab_size": 1 << 22}


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA-2's hyper-parameters under Hugging Face's names (Touvron et al. 2023, section 2.2), and what others add."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 0
    """Defaults to ``hidden_size / num_attention_heads``."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """A token sees itself and the ``sliding_window - 1`` before it (Jiang et al. 2023, section 2); None: all before."""
    biased_modules: tuple[str, ...] = ()
    """The linear layers of a block that add a bias."""
    head_norms: bool = False
    """Whether each head of q and k is normalised before the rotation."""
    model_type: str = "llama"
    """The name in Hugging Face's configurations."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "vocab_size", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= _LARGEST.get(name, 1 << 24):
                raise CheckpointError(f"{name} is {value!r}, which no LLaMA model has")
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise CheckpointError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if type(self.head_dim) is not int or not 0 < self.head_dim <= 1024 or self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim!r}; rotary embeddings need an even number up to 1024")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 0 < self.rms_norm_eps < 1 or not 1 <= self.rope_theta < 1e12:
            raise CheckpointError(f"rms_norm_eps {self.rms_norm_eps!r} or rope_theta {self.rope_theta!r} is impossible")
        if isinstance(self.rope_scaling, DynamicScaling) and self.head_dim < 4:
            raise CheckpointError(f"head_dim {self.head_dim} is too small for the rope type 'dynamic'")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta == 1:
            raise CheckpointError("rope_theta 1 is impossible for the rope type 'yarn'")
        if self.sliding_window is not None and not 0 < self.sliding_window < 1 << 24:
            raise CheckpointError(f"sliding_window is {self.sliding_window!r}, which no model has")

    def added_tensors(self) -> str | None:
        """The tensors that LLaMA-2 has not, in words; None: there are none."""
        additions = [f"a bias in {', '.join(self.biased_modules)}"] if self.biased_modules else []
        additions += ["norms of the heads of q and k"] if self.head_norms else []
        return f"this {self.model_type} model has {' and '.join(additions)}" if additions else None

    def with_layers(self, num_layers: int | None) -> LlamaConfig:
        """The same model cut after its first ``num_layers`` blocks (None: uncut)."""
        if num_layers is None:
            return self
        if not 1 <= num_layers <= self.num_hidden_layers:
            raise SpecError(
                f"{num_layers} layers asked for", "model.num_layers", f"the model has {self.num_hidden_layers}"
            )
        return dataclasses.replace(self, num_hidden_layers=num_layers)

    def linear_shape(self, module: str) -> tuple[int, int]:
        """``(out, in)`` of one of the seven linear layers of a block."""
        out, into = LINEAR_SIZES[module]
        sizes = self.sizes()
        return sizes[out], sizes[into]

    def elements_of_product(self, module: str) -> int:
        """Elements of a linear layer's matrix with those it may be joined with: of q, k and v, or of gate and up."""
        group = next((group for group in (QKV_MODULES, GATE_UP_MODULES) if module in group), (module,))
        return sum(math.prod(self.linear_shape(name)) for name in group)

    def sizes(self) -> dict[str, int]:
        """The sizes that ``LINEAR_SIZES`` names, and that of the vocabulary."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            QUERY_SIZE: self.num_attention_heads * self.head_dim,
            KEY_SIZE: self.num_key_value_heads * self.head_dim,
            "vocab_size": self.vocab_size,
        }

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of a checkpoint in Hugging Face's names and order; a tied head has no tensor of its own."""
        D, V = self.hidden_size, self.vocab_size
        yield "model.embed_tokens.weight", (V, D)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for module in LINEAR_MODULES:
                yield f"{prefix}{linear_path(module)}.weight", self.linear_shape(module)
                if module in self.biased_modules:
                    yield f"{prefix}{linear_path(module)}.bias", self.linear_shape(module)[:1]
            if self.head_norms:
                yield f"{prefix}self_attn.q_norm.weight", (self.head_dim,)
                yield f"{prefix}self_attn.k_norm.weight", (self.head_dim,)
            yield f"{prefix}input_layernorm.weight", (D,)
            yield f"{prefix}post_attention_layernorm.weight", (D,)
        yield "model.norm.weight", (D,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (V, D)


def linear_module(name: str) -> str | None:
    """Of which of the seven linear layers a tensor is the matrix, by its name; None: of none."""
    module, _, tensor = name.rpartition(".")
    module = module.rpartition(".")[2]
    return module if tensor == "weight" and module in LINEAR_MODULES else None


def linear_path(module: str) -> str:
    """Where a linear layer lives inside its block: ``q_proj`` -> ``self_attn.q_proj``."""
    return f"self_attn.{module}" if module in ATTENTION_MODULES else f"mlp.{module}"

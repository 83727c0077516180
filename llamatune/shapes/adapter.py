"""An adapter's kind, rank, alpha, dropout and target modules, and the shapes of its tensors. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatune.shapes.llama_config import LlamaConfig, linear_path


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter: its class, ``module:name``, and the tensors that it adds to each matrix (out, in).

    ``tensors`` maps a tensor's name to its dimensions, each ``r``, ``in`` or ``out``. PEFT's files name a tensor
    ``NAME.weight``, those of ``bare`` ``NAME``. Those of ``frozen`` are not trained. ``reads_base``: the first values
    follow from the base's weights. What is written is of a kind that PEFT knows, ``stored_as`` if it is another, and of
    ``stored_ranks`` times the rank.
    """

    layer: str
    tensors: Mapping[str, tuple[str, ...]]
    bare: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    reads_base: bool = False
    stored_as: str | None = None
    stored_ranks: int = 1

    def stored_name(self, stem: str, tensor: str) -> str:
        """``model.layers.0.self_attn.q_proj`` and ``lora_A`` -> ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
        return f"{stem}.{tensor}" if tensor in self.bare else f"{stem}.{tensor}.weight"


_LORA = {"lora_A": ("r", "in"), "lora_B": ("out", "r")}
_FROM_BASE: dict[str, Any] = {
    "tensors": {**_LORA, "initial_A": ("r", "in"), "initial_B": ("out", "r")},
    "frozen": ("initial_A", "initial_B"),
    "reads_base": True,
    "stored_as": "lora",
    "stored_ranks": 2,
}
ADAPTER_KINDS: dict[str, AdapterKind] = {
    "lora": AdapterKind("llamatune.model.adapters.lora:LoRALinear", _LORA),
    "dora": AdapterKind(
        "llamatune.model.adapters.dora:DoRALinear",
        {**_LORA, "lora_magnitude_vector": ("out",)},
        bare=("lora_magnitude_vector",),
        reads_base=True,
    ),
    "lora_fa": AdapterKind("llamatune.model.adapters.lora:LoRALinear", _LORA, frozen=("lora_A",), stored_as="lora"),
    "pissa": AdapterKind("llamatune.model.adapters.from_base:PiSSALinear", **_FROM_BASE),
    "olora": AdapterKind("llamatune.model.adapters.from_base:OLoRALinear", **_FROM_BASE),
}
"""Every kind by name. A new kind is a line here and a file in ``model/adapters``."""

WHOLE_MODULES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "norm": "model.norm"}
"""What may be trained whole beside the updates, with its path. Of norms it is the final one."""


@dataclass(frozen=True)
class AdapterSpec:
    """Which linear layers are adapted, and how. ``target_modules`` are kept sorted, as PEFT writes them.

    Each is the name of a module, ``q_proj``, for all blocks, or its path in one, ``layers.3.self_attn.q_proj``.
    ``module_ranks`` and ``module_alphas`` hold what differs from ``r`` and ``alpha``, under such names and paths; that
    of a path comes before that of a name. ``drawn`` says how A begins: ``kaiming`` or ``gaussian``. ``whole`` are those
    of ``WHOLE_MODULES`` that are trained too, in fp32, in place of the base's.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    kind: str = "lora"
    module_ranks: tuple[tuple[str, int], ...] = ()
    module_alphas: tuple[tuple[str, float], ...] = ()
    drawn: str = "kaiming"
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that are adapted in some block."""
        return tuple(sorted({target.rpartition(".")[2] for target in self.target_modules}))

    def adapts(self, module: str, layer: int | None = None) -> bool:
        """Whether a module of this block is adapted; None: of every block, as in all that a run spec describes."""
        return module in self.target_modules or _path(module, layer) in self.target_modules

    def rank(self, module: str, layer: int | None = None) -> int:
        """The rank of one update."""
        ranks = dict(self.module_ranks)
        return ranks.get(_path(module, layer), ranks.get(module, self.r))

    def scaling(self, module: str = "", layer: int | None = None) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
        r, alphas = self.rank(module, layer), dict(self.module_alphas)
        alpha = alphas.get(_path(module, layer), alphas.get(module, self.alpha))
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def facts(self) -> dict[str, Any]:
        """As JSON; what plain LoRA does not use is left out."""
        plain = {"kind": "lora", "module_ranks": (), "module_alphas": (), "drawn": "kaiming", "whole": ()}
        facts = vars(self) | {"target_modules": list(self.target_modules)}
        return {name: value for name, value in facts.items() if name not in plain or value != plain[name]}

    def stored(self) -> AdapterSpec:
        """The adapter that is written: the same update as a kind that PEFT knows."""
        kind = ADAPTER_KINDS[self.kind]
        times = kind.stored_ranks
        alphas = math.sqrt(times) if self.use_rslora else times
        return replace(
            self,
            kind=kind.stored_as or self.kind,
            r=self.r * times,
            alpha=self.alpha * alphas,
            module_ranks=tuple((name, r * times) for name, r in self.module_ranks),
            module_alphas=tuple((name, alpha * alphas) for name, alpha in self.module_alphas),
            drawn="kaiming",
        )

    def updates(self, config: LlamaConfig) -> dict[tuple[str, int], tuple[int, float]]:
        """Of each adapted matrix, by module and block, the rank and the scaling, to seven digits."""
        places = ((module, layer) for module in self.modules for layer in range(config.num_hidden_layers))
        return {
            place: (self.rank(*place), float(f"{self.scaling(*place):.6e}")) for place in places if self.adapts(*place)
        }

    def tensor_shapes(self, config: LlamaConfig, module: str, layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors of one linear layer by name; none if it is no target."""
        if not self.adapts(module, layer):
            return {}
        out_features, in_features = config.linear_shape(module)
        sizes = {"r": self.rank(module, layer), "in": in_features, "out": out_features}
        tensors = ADAPTER_KINDS[self.kind].tensors
        return {name: tuple(sizes[dimension] for dimension in dimensions) for name, dimensions in tensors.items()}

    def trained_shapes(self, config: LlamaConfig, module: str, layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """Those that are trained."""
        frozen = ADAPTER_KINDS[self.kind].frozen
        return {name: shape for name, shape in self.tensor_shapes(config, module, layer).items() if name not in frozen}

    def parameter_count(self, config: LlamaConfig, module: str, layer: int | None = None) -> int:
        """Parameters of the adapter of one linear layer of one block."""
        return sum(map(math.prod, self.tensor_shapes(config, module, layer).values()))

    def trained_count(self, config: LlamaConfig, module: str, layer: int | None = None) -> int:
        """Those that are trained."""
        return sum(map(math.prod, self.trained_shapes(config, module, layer).values()))

    def checkpoint_shapes(self, config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of a model's adapter by its name, ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
        kind = ADAPTER_KINDS[self.kind]
        for layer in range(config.num_hidden_layers):
            for module in self.modules:
                for name, shape in self.tensor_shapes(config, module, layer).items():
                    yield kind.stored_name(f"model.{_path(module, layer)}", name), shape
        yield from self.whole_shapes(config).items()

    @property
    def whole_names(self) -> tuple[str, ...]:
        """The tensors that are trained whole, ``lm_head.weight``."""
        return tuple(f"{WHOLE_MODULES[module]}.weight" for module in self.whole)

    def whole_shapes(self, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """Their shapes; of a tied base the head has a tensor of its own too."""
        matrix = config.vocab_size, config.hidden_size
        shapes = {"embed_tokens": matrix, "lm_head": matrix, "norm": matrix[1:]}
        return {name: shapes[module] for name, module in zip(self.whole_names, self.whole, strict=True)}

    def unties(self, config: LlamaConfig) -> bool:
        """Whether head and embedding, which the base ties, become different, as in PEFT."""
        return config.tie_word_embeddings and bool({"embed_tokens", "lm_head"}.intersection(self.whole))


def _path(module: str, layer: int | None) -> str:
    return f"layers.{layer}.{linear_path(module)}"

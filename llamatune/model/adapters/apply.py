"""Put an adapter on a model, read and fill its trained tensors by their adapter names."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from llamatune.errors import SpecError
from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.layers import Embedding, Linear, RMSNorm, Trained
from llamatune.model.transformer import Head, Transformer
from llamatune.shapes.adapter import ADAPTER_KINDS, WHOLE_MODULES, AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, linear_path


def adapter_class(kind: str) -> type[AdaptedLinear]:
    """The class of an adapter kind, from the file that ``ADAPTER_KINDS`` names."""
    return pkgutil.resolve_name(ADAPTER_KINDS[kind].layer)  # type: ignore[no-any-return]


def apply_adapter(
    model: Transformer,
    adapter: AdapterSpec,
    seed: int | None = 0,
    bring_block: Callable[[int], None] | None = None,
) -> None:
    """Freeze ``model``, replace every target layer by an adapted one, and train what is trained whole in fp32.

    Args:
        seed: that of the first values; None: they stay zero, others are loaded into them.
        bring_block: called before the weights of a block are read, which may not lie on the device yet.
    """
    unknown = sorted(set(adapter.modules) - set(LINEAR_MODULES))
    if unknown or not adapter.target_modules:
        raise SpecError(
            f"no linear layer called {unknown[0]!r}" if unknown else "no target modules",
            "lora.target_modules",
            f"there are {', '.join(LINEAR_MODULES)}",
        )
    model.requires_grad_(False)
    generator, adapted = torch.Generator().manual_seed(seed or 0), adapter_class(adapter.kind)
    kind = ADAPTER_KINDS[adapter.kind]
    for layer, block in enumerate(model.model.layers):
        if kind.reads_base and seed is not None and bring_block is not None:
            bring_block(layer)
        for name in LINEAR_MODULES:
            if shapes := adapter.tensor_shapes(model.config, name, layer):
                frozen = block.get_submodule(linear_path(name))
                assert isinstance(frozen, Linear)
                replacement = adapted(frozen, shapes, adapter.scaling(name, layer), adapter.dropout)
                replacement.belong_to(kind)
                replacement.drawn = adapter.drawn
                if seed is not None:
                    replacement.start(generator)
                block.set_submodule(linear_path(name), replacement)
    _train_whole(model, adapter)


def _train_whole(model: Transformer, adapter: AdapterSpec) -> None:
    """A trained copy in fp32 in place of each weight that is trained whole; a head that was tied keeps the base's."""
    if adapter.unties(model.config):
        model.lm_head = Head(model.config.hidden_size, model.config.vocab_size)
        model.lm_head.weight = model.model.embed_tokens.weight
    for name in adapter.whole:
        module = model.get_submodule(WHOLE_MODULES[name])
        assert isinstance(module, Embedding | Head | RMSNorm)
        weight = module.weight.detach()
        module.weight = nn.Parameter(weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format))


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every tensor of the adapter under its name, ``model.layers.0.self_attn.q_proj.lora_A.weight``.

    Those that are trained whole have the names of the base's.
    """
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            for name, parameter in zip(module.names, module.tensors, strict=True):
                assert isinstance(parameter, nn.Parameter)
                yield module.kind.stored_name(path, name), parameter
        elif path in WHOLE_MODULES.values():
            assert isinstance(module.weight, nn.Parameter)
            if module.weight.requires_grad:
                yield f"{path}.weight", module.weight


def switch_of(model: nn.Module) -> AdapterSwitch:
    """A switch for all adapted layers of a model."""
    switch = AdapterSwitch()
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.switch = switch
    return switch


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapter of a model from tensors under their adapter names; both sets of names are the same."""
    parameters = dict(adapter_parameters(model))
    assert parameters.keys() == tensors.keys(), "the adapter was not checked against the model"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.forget()


def stored_tensors(adapter: AdapterSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as they are written, under the names of ``adapter.stored()``."""
    return _converted(tensors, adapter, adapter.stored(), adapter_class(adapter.kind).stored)


def restored_tensors(adapter: AdapterSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, bit for bit, from those of ``adapter.stored()``."""
    return _converted(stored, adapter.stored(), adapter, adapter_class(adapter.kind).restored)


def _converted(
    tensors: Mapping[str, Tensor], before: AdapterSpec, after: AdapterSpec, convert: Callable[[Trained], Trained]
) -> dict[str, Tensor]:
    old, new = ADAPTER_KINDS[before.kind], ADAPTER_KINDS[after.kind]
    first, *_ = old.tensors
    converted = {name: tensors[name] for name in before.whole_names}
    for name in tensors:
        stem = name.removesuffix(old.stored_name("", first))
        if stem != name:
            given = tuple(tensors[old.stored_name(stem, tensor)] for tensor in old.tensors)
            names = [new.stored_name(stem, tensor) for tensor in new.tensors]
            converted |= zip(names, convert(given), strict=True)
    return converted

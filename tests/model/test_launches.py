"""What a layer of fused blocks costs beside its products, and that a GPU's forms of them compute what a CPU's do.

A CPU is given the operators that only GPUs have, and kernels are played by their plain functions.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from llamatune.model import layers, loss, nf4, products, rope
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.fused import operations, window_casts
from llamatune.model.fused.window_casts import cast_for_window
from llamatune.model.initialise import initialise
from llamatune.model.kernels import choice
from llamatune.model.loss import summed_loss
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.shapes import attention_kernels, tile_sizes
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, QKV_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute

D, F, LENGTHS = 64, 176, (48, 48)
QV = ("q_proj", "v_proj")
BIASES: dict[str, Any] = {"biased_modules": LINEAR_MODULES}
QWEN_2: dict[str, Any] = {"biased_modules": QKV_MODULES}
HEAD_NORMS: dict[str, Any] = {"head_norms": True}


def _addmm_to(
    y: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    assert beta == 0
    return alpha * (a.to(out_dtype) @ b.to(out_dtype))


def _fused_dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    mask = torch.empty_like(x).bernoulli_(p, generator=generator)
    return x * mask / p, mask.to(torch.uint8)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (products, layers, operations, window_casts):
        monkeypatch.setattr(module, "at_once", lambda x: True)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("addmm.dtype", _addmm_to, "CPU")  # type: ignore[no-untyped-call]
    library.impl("_fused_dropout", _fused_dropout, "CPU")  # type: ignore[no-untyped-call]
    yield
    library._destroy()  # type: ignore[no-untyped-call]


def fused_model(
    depth: int,
    targets: tuple[str, ...],
    dropout: float,
    dtype: torch.dtype,
    level: Recompute,
    nf4: bool = False,
    kind: str = "lora",
    **changes: Any,
) -> Transformer:
    model = Transformer(LlamaConfig(D, F, depth, 4, 4, 131, **changes))
    initialise(model, 0, 0.15)
    if changes:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    if nf4:
        quantize_blocks(model, NF4Weight, dtype)
    model.to(dtype)
    apply_adapter(model, AdapterSpec(4, 8, dropout, targets, kind=kind), 1)
    for name, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        if name.endswith("lora_B.weight"):
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.2)
    apply_activation_checkpointing(model, "none", fused=True, levels=(level,) * depth)
    return model.train()


def run(model: Transformer, within: contextlib.AbstractContextManager[Any]) -> dict[str, Tensor]:
    ids = torch.randint(3, 131, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    with cast_for_window(model, model.product_dtype), within:
        torch.manual_seed(7)
        summed_loss(model, ids, ids, LENGTHS).backward()  # type: ignore[no-untyped-call]
    assert all(not layer.casts for layer in model.modules() if hasattr(layer, "casts"))
    return {name: p.grad for name, p in adapter_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.06)], ids=["fp64", "bf16"])
@pytest.mark.parametrize("changes", [{}, {**BIASES, **HEAD_NORMS}], ids=["", "with biases and norms of heads"])
def test_the_forms_of_a_gpu_compute_the_same(
    request: pytest.FixtureRequest,
    changes: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    dropout: float,
    level: Recompute,
) -> None:
    model = fused_model(2, LINEAR_MODULES, dropout, dtype, level, **changes)
    expected = run(model, contextlib.nullcontext())
    request.getfixturevalue("as_on_a_gpu")
    for parameter in model.parameters():
        parameter.grad = None
    found = run(model, contextlib.nullcontext())
    assert len(expected) == 2 * 2 * 7
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize("kind", ["dora", "lora_fa", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_so_do_they_for_each_kind_of_adapter(request: pytest.FixtureRequest, dropout: float, kind: str) -> None:
    model = fused_model(2, LINEAR_MODULES, dropout, torch.float64, Recompute.FEED_FORWARD, kind=kind)
    expected = run(model, contextlib.nullcontext())
    request.getfixturevalue("as_on_a_gpu")
    for parameter in model.parameters():
        parameter.grad = None
    found = run(model, contextlib.nullcontext())
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-12, name


FREE = ("empty", "new_empty", "randint", "_local_scalar_dense")
"""No kernel of a GPU: memory alone, and the seeds of dropout, which are drawn on the CPU."""


class Counter(TorchDispatchMode):
    """Products, and what else runs: how often, and the bytes that it reads and writes. Attention counts in neither."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = self.bytes = 0
        self.names: list[str] = []

    def add(self, name: str, *values: Any) -> None:
        self.others += 1
        self.names.append(name)
        tensors = {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}
        self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_", "addmm.dtype"):
            self.products += 1
        elif not (func.is_view or name.startswith(FREE) or "attention" in name):
            self.add(name, args, given)
        return given


@contextlib.contextmanager
def played_kernels(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel is one launch that computes what the plain function computes."""

    def kernel(file: str, name: str) -> Callable[..., Any]:
        plain = next(
            vars(module)[name] for module in (operations, layers, rope, nf4, loss) if name in vars(module)
        ).__wrapped__

        def launch(*args: Any, **options: Any) -> Any:
            with _disable_current_modes():  # type: ignore[no-untyped-call]
                given = plain(*args, **options)
            counter.add(f"kernel {name}", args, options, given)
            return given

        return launch

    monkeypatch.setattr(choice, "_kernel", kernel)
    with choice.running_kernels("cpu"), counter:
        yield


# At most: launches but products, products, and what the launches read and write in units of rows x hidden in 16 bits.
COSTS = [
    (QV, 0.05, Recompute.NOTHING, False, {}, 19, 34, 56.6),
    (QV, 0.0, Recompute.NOTHING, False, {}, 13, 34, 41.6),
    (LINEAR_MODULES, 0.05, Recompute.NOTHING, False, {}, 52, 90, 119.4),
    (QV, 0.05, Recompute.BLOCK, False, {}, 27, 46, 65.9),
    (QV, 0.0, Recompute.NOTHING, True, {}, 27, 34, 63.4),  # each of seven matrices is unpacked twice
    (QV, 0.0, Recompute.NOTHING, False, QWEN_2, 13, 34, 41.6),  # a product adds its bias at no cost
    (QV, 0.0, Recompute.NOTHING, False, BIASES, 16, 34, 43.6),  # o and, by tiles, down add to the residual stream too
    (QV, 0.0, Recompute.NOTHING, False, HEAD_NORMS, 17, 34, 51.6),
    (QV, 0.0, Recompute.BLOCK, False, HEAD_NORMS, 25, 46, 59.8),
]


@pytest.mark.parametrize(("targets", "dropout", "level", "packed", "changes", "others", "products", "traffic"), COSTS)
def test_what_a_layer_costs(
    monkeypatch: pytest.MonkeyPatch,
    as_on_a_gpu: None,
    targets: tuple[str, ...],
    dropout: float,
    level: Recompute,
    packed: bool,
    changes: dict[str, Any],
    others: int,
    products: int,
    traffic: float,
) -> None:
    monkeypatch.setattr(tile_sizes, "TILE_TOKENS", 50)  # two tiles
    monkeypatch.setattr(attention_kernels, "SHORT_TOKENS", 0)  # no casts for attention
    counted = []
    for depth in (2, 3):
        model, counter = fused_model(depth, targets, dropout, torch.bfloat16, level, packed, **changes), Counter()
        run(model, played_kernels(counter, monkeypatch))
        counted.append(counter)
    fewer, more = counted
    left = dict(collections.Counter(more.names) - collections.Counter(fewer.names))
    found = (more.bytes - fewer.bytes) / (sum(LENGTHS) * D * 2)
    assert more.others - fewer.others <= others, left
    assert more.products - fewer.products <= products
    assert found <= traffic

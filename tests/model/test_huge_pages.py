"""Weights in huge pages: copies behind one another, freed with the last; joined products of quantised layers."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import ModelSource
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.model import huge_pages
from llamatune.model.adjacent_tensors import adjacent
from llamatune.model.huge_pages import HugePages
from llamatune.model.packed_weight import PackedWeight
from llamatune.model.transformer import Transformer

CPU = torch.device("cpu")


def pages_at(address: int) -> list[str]:
    """The lines of the system's table of this process's memory that hold an address."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            found.append(line)
    return found


def test_copies_lie_behind_one_another_from_the_start_of_a_page() -> None:
    pages = HugePages(64 << 20, CPU)
    sizes = [(6, torch.float32), (2, torch.bfloat16), (4, torch.bfloat16)]
    given = [torch.randn(rows, 32).to(dtype) for rows, dtype in sizes]
    copies = [pages.copied(x) for x in given]
    for x, copy in zip(given, copies, strict=True):
        assert copy.data_ptr() != x.data_ptr()
        assert torch.equal(copy, x)
    assert copies[0].data_ptr() % (2 << 20) == 0
    whole = adjacent(copies[1:])
    assert whole is not None
    assert torch.equal(whole, torch.cat(given[1:]))
    whole[0] = 0
    assert not copies[1][0].any(), "no memory of its own"


def test_what_has_no_room_stays_where_it_is() -> None:
    x = torch.ones(4, dtype=torch.uint8)
    assert HugePages(1 << 20, CPU).copied(x) is x, "a small model is in the caches"
    assert HugePages(1 << 30, torch.device("cuda")).copied(x) is x
    assert HugePages(1 << 62, CPU).copied(x) is x, "more than the system gives"
    pages = HugePages(64 << 20, CPU)
    large = torch.empty(65 << 20, dtype=torch.uint8)
    assert pages.copied(large) is large
    assert pages.copied(x) is not x


def test_memory_is_freed_with_the_last_copy() -> None:
    pages = HugePages(64 << 20, CPU)
    first, second = (pages.copied(torch.ones(1 << 20)) for _ in range(2))
    where = second.data_ptr()
    del pages, first
    gc.collect()
    assert pages_at(where)
    del second
    gc.collect()
    # Another mapping may be there by now, but not as large a one.
    assert not any(int(line.split()[0].split("-")[1], 16) - where > (50 << 20) for line in pages_at(where))


def test_the_whole_of_adjacent_parameters_keeps_their_memory(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(64)))
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    parts = [
        torch.nn.Parameter(
            torch.frombuffer(memory, dtype=torch.uint8, count=16, offset=offset).view(4, 4), requires_grad=False
        )
        for offset in (8, 24)
    ]
    whole = adjacent(parts)
    parts[0].data, parts[1].data = torch.zeros(1), torch.zeros(1)
    del memory
    gc.collect()
    assert str(file) in Path("/proc/self/maps").read_text()
    assert whole is not None
    assert whole.shape == (8, 4)
    assert bytes(whole.flatten().tolist()) == bytes(range(8, 40))
    del whole
    gc.collect()
    assert str(file) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("other", ["apart", "another dtype", "another width", "transposed", "another order"])
def test_other_tensors_are_not_adjacent(other: str) -> None:
    x = torch.arange(64, dtype=torch.int8).view(8, 8)
    parts = {
        "apart": [x[:2], x[4:]],
        "another dtype": [x[:4], x[4:].view(torch.uint8)],
        "another width": [x[:4], x[4:].view(8, 4)],
        "transposed": [x.T[:4], x.T[4:]],
        "another order": [x[4:], x[:4]],
    }
    assert adjacent(parts[other]) is None
    found = adjacent([x[:4], x[4:6]])
    assert found is not None
    assert torch.equal(found, x[:6])


@torch.inference_mode()
def logits(model: Transformer, columns: int) -> Tensor:
    """Of two rows of so many tokens; up to four are few enough for the kernel that reads codes."""
    ids = torch.tensor([[1, 7, 9, 4, 12, 5, 30], [1, 30, 31, 8, 2, 2, 19]])[:, :columns]
    found: Tensor = model(ids)
    return found


@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"}], ids=repr)
@pytest.mark.parametrize("in_pages", [False, True])
def test_logits_of_joined_int8_are_those_of_separate_products(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    family: dict[str, Any],
    in_pages: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With few rows bit for bit; of the base and, with an adapter, beside it. 70 tokens: as near to bf16."""
    monkeypatch.setattr(huge_pages, "_LEAST", 0 if in_pages else 1 << 40)
    base = tiny_base(torch.bfloat16, hidden_size=96, intermediate_size=128, **family)
    adapter = peft_adapter(base) if not family else None
    opened = open_model(ModelSource(base, adapter, compare=adapter is not None, device="cpu", dtype="int8"))
    joined = opened.load(ignore_event, never_stop, generates=True).by_prefix
    apart = opened.load(ignore_event, never_stop).by_prefix
    for prefix, model in joined.items():
        for block, separate in zip(model.model.layers, apart[prefix].model.layers, strict=True):
            for part, names in ((block.self_attn, "qkv"), (block.mlp, ("gate", "up"))):
                weight, where = part.joined.weight, part.joined.weight.codes.data_ptr()
                assert isinstance(weight, PackedWeight)
                assert where % (2 << 20 if in_pages and part is model.model.layers[0].self_attn else 1) == 0
                for name in names:
                    codes = part.get_submodule(f"{name}_proj").quantized.codes
                    assert codes.data_ptr() == where, "a part of the joined one"
                    where += codes.numel()
            assert not hasattr(separate.self_attn, "joined"), "a loss has the bits of training's"
        for columns in (1, 4, 7):
            x = torch.empty(2, columns, 96, dtype=torch.bfloat16)
            assert model.model.layers[0].mlp.joined.suits(x) == (columns <= 4)
            assert torch.equal(logits(model, columns), logits(apart[prefix], columns)), columns
        ids = torch.randint(3, 30, (1, 70), generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            assert model.model.layers[0].mlp.joined.suits(torch.empty(70, 96, dtype=torch.bfloat16))
            found, expected, in_bf16 = (one(ids).float() for one in (model, apart[prefix], load_model(base)))
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
        if adapter is None or prefix:
            assert (found - in_bf16).abs().mean() < 1.05 * (expected - in_bf16).abs().mean()


@pytest.mark.parametrize("kind", ["nf4", "float8", "int8"])
def test_a_quantised_model_in_pages_computes_the_same(
    tiny_base: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(torch.bfloat16)
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(huge_pages, "_LEAST", least)
        source = ModelSource(base, device="cpu", dtype=kind)
        model = open_model(source).load(ignore_event, never_stop).by_prefix[""]
        packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
        where = sorted(weight.codes.data_ptr() for weight in packed)
        assert (where[-1] - where[0] < sum(weight.codes.nbytes for weight in packed) + 64 * len(packed)) == (least == 0)
        found.append(logits(model, 7))
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all()
    assert (found[0] - logits(load_model(base).eval(), 7)).abs().max() > 1e-4

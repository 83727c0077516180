"""Meta shards as plain torch makes them: views of a whole tensor, which ``torch.save`` writes with strides."""

from __future__ import annotations

import pytest
import torch

from llamatune.checkpoints import checkpoint as checkpoint_module
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.formats.torch_archive import read_archive

from .conftest import META_NAMES, meta_state, save_meta, save_tiny

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def save_views(path, model, shards, transposed=(), tied=False):
    """A Meta directory whose tensors are what ``chunk`` gives, without ``contiguous`` or ``clone``."""
    save_meta(path, model, shards=1)
    state = meta_state(model)
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    for name in state:
        if name.endswith(transposed or ("no such tensor",)):
            state[name] = state[name].t().contiguous().t()
    for shard in range(shards):
        part = {}
        for name, weight in state.items():
            axis = 1 if any(key in name for key in ("attention.wo", "feed_forward.w2", "tok_embeddings")) else 0
            part[name] = weight if "norm" in name else torch.chunk(weight, shards, dim=axis)[shard]
        torch.save(part, path / f"consolidated.{shard:02d}.pth")
    return path


def same_model(path, source):
    views, whole = open_checkpoint(path), open_checkpoint(source)
    for name in whole.shapes:
        assert torch.equal(views.tensor(name), whole.tensor(name)), name
        assert torch.equal(views.tensor(name, mapped=True), whole.tensor(name)), name
        rows = [n % whole.shapes[name][0] for n in (5, 0, -1, 17, 16)]
        assert torch.equal(views.rows(name, rows), whole.rows(name, rows)), name
    assert fingerprint(views) == fingerprint(whole)
    for writable in (False, True):
        with torch.no_grad():
            assert torch.equal(load_model(path, writable=writable)(TOKENS), load_model(source)(TOKENS))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("portion", [16 << 20, 300])
def test_chunks_of_either_dimension_are_the_unsplit_model(tiny, tmp_path, monkeypatch, shards, portion):
    monkeypatch.setattr(checkpoint_module, "_PORTION_BYTES", portion)
    path = save_views(tmp_path / "views", tiny[1], shards)
    strides = {name: entry.strides for name, entry in read_archive(path / "consolidated.00.pth").items()}
    assert strides["layers.0.attention.wo.weight"] == ((32, 1) if shards > 1 else None)
    assert strides["layers.0.attention.wq.weight"] is None
    same_model(path, tiny[0])


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("portion", [16 << 20, 300])
def test_transposed_weights_are_read_right(tiny, tmp_path, monkeypatch, shards, portion):
    monkeypatch.setattr(checkpoint_module, "_PORTION_BYTES", portion)
    every_matrix = tuple(f"{name}.weight" for name in META_NAMES.values() if "norm" not in name)
    path = save_views(tmp_path / "views", tiny[1], shards, (*every_matrix, "tok_embeddings.weight", "output.weight"))
    assert read_archive(path / "consolidated.00.pth")["layers.0.attention.wq.weight"].strides == (1, 32)
    same_model(path, tiny[0])


def test_a_vector_may_be_a_column(tiny, tmp_path):
    path = save_meta(tmp_path / "views", tiny[1])
    state = torch.load(path / "consolidated.00.pth", weights_only=True)
    state["norm.weight"] = torch.stack([state["norm.weight"], torch.zeros(32)], dim=1)[:, 0]
    torch.save(state, path / "consolidated.00.pth")
    assert read_archive(path / "consolidated.00.pth")["norm.weight"].strides == (2,)
    same_model(path, tiny[0])


def test_a_tied_models_embedding_and_head_may_be_chunks_of_one_storage(tmp_path):
    model = save_tiny(tmp_path / "hf", tied=True)
    path = save_views(tmp_path / "views", model, 2, tied=True)
    views = open_checkpoint(path)
    embedding = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(views.tensor("model.embed_tokens.weight"), embedding)
    assert torch.equal(views.tensor("lm_head.weight"), embedding)
    assert fingerprint(views) == fingerprint(open_checkpoint(tmp_path / "hf"))


def test_a_merge_reads_views_and_writes_plain_tensors(tiny, tiny_meta, tiny_adapter, tmp_path):
    path = save_views(tmp_path / "views", tiny[1], 2, ("attention.wq.weight",))
    merge_lora(MergeOptions(path, tiny_adapter, tmp_path / "merged"))
    merge_lora(MergeOptions(tiny_meta, tiny_adapter, tmp_path / "judge"))
    merged, judge = open_checkpoint(tmp_path / "merged"), open_checkpoint(tmp_path / "judge")
    assert all(torch.equal(merged.tensor(name), judge.tensor(name)) for name in judge.shapes)
    assert all(entry.strides is None for entry in read_archive(tmp_path / "merged" / "consolidated.01.pth").values())


def test_what_lies_between_the_rows_of_a_view_is_not_held(tiny, tmp_path):
    """A view of 4 KiB in a storage of 64 MiB costs a few portions at most, whatever its strides."""
    path = save_meta(tmp_path / "views", tiny[1])
    state = torch.load(path / "consolidated.00.pth", weights_only=True)
    name = "layers.0.attention.wv.weight"
    wide = torch.zeros(16, 1 << 20)
    wide[:, :32] = state[name]
    state[name] = wide[:, :32]
    torch.save(state, path / "consolidated.00.pth")
    views = open_checkpoint(path)
    sizes = []
    empty = torch.empty
    try:
        torch.empty = lambda *shape, **options: sizes.append(made := empty(*shape, **options)) or made
        tensor = views.tensor("model.layers.0.self_attn.v_proj.weight")
    finally:
        torch.empty = empty
    assert torch.equal(tensor, tiny[1].state_dict()["model.layers.0.self_attn.v_proj.weight"])
    assert max(made.nbytes for made in sizes if made.device.type == "cpu") <= (16 << 20) + 4096

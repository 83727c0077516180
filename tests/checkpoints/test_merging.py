"""Merging: PEFT's weights, rounded once, in either format, all at once or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import zipfile
from collections import namedtuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llamatune.checkpoints import huggingface_files, huggingface_weights
from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError, Stopped
from llamatune.events import Notice, Progress, ignore_event
from llamatune.formats import torch_archive_writer
from llamatune.formats.manifest import Staging
from llamatune.shapes.llama_config import LINEAR_MODULES

from .conftest import meta_state, save_adapter, save_meta, save_peft, save_tiny

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


def judged(base, adapter, dtype=torch.float32):
    """What PEFT makes of it."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def files_of(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], list(LINEAR_MODULES)])
@pytest.mark.parametrize("base", ["hf", "meta"])
@pytest.mark.parametrize("format_", ["same", "hf", "meta"])
def test_merged_weights_are_pefts(tiny, tiny_meta, tmp_path, targets, base, format_):
    adapter = save_peft(tmp_path / "adapter", tiny[0], targets)
    source = tiny[0] if base == "hf" else tiny_meta
    report = merge_lora(MergeOptions(source, adapter, tmp_path / "out", format_))
    merged = open_checkpoint(tmp_path / "out")
    assert merged.format == (base if format_ == "same" else format_)
    judge = judged(tiny[0], adapter)
    state = judge.state_dict()
    assert sorted(merged.shapes) == sorted(state)
    for name in merged.shapes:
        torch.testing.assert_close(merged.tensor(name), state[name], rtol=0, atol=1e-6)
    assert (report.tensors, report.merged_tensors) == (len(state), 2 * len(targets))
    assert report.max_abs_error == 0
    with torch.no_grad():
        expected = judge(TOKENS).logits
        torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), expected, rtol=1e-4, atol=1e-4)
        if merged.format == "hf":
            theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
            torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_untouched_tensors_keep_their_bytes_and_files_their_layout(tmp_path):
    save_tiny(tmp_path / "base", shard="20KB", dtype=torch.bfloat16)
    (tmp_path / "base" / "tokenizer.json").write_text('{"not": "ours"}\n')
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj"])
    merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out"))
    before, after = files_of(tmp_path / "base"), files_of(tmp_path / "out")
    assert set(after) == set(before) | {"llamatune.json", "README.md"}
    changed = {name for name in before if before[name] != after[name]}
    for name in ("generation_config.json", "tokenizer.json"):
        assert name not in changed
    config = json.loads(after["config.json"])
    assert json.loads(before["config.json"]).items() <= config.items()
    index = json.loads(before["model.safetensors.index.json"])["weight_map"]
    assert json.loads(after["model.safetensors.index.json"])["weight_map"] == index
    assert changed - {"model.safetensors.index.json", "config.json"} == {
        shard for tensor, shard in index.items() if tensor.endswith("q_proj.weight")
    }


@pytest.mark.parametrize("llama_3_split", [False, True])
def test_meta_base_keeps_its_shards_and_parameters(tiny, tiny_adapter, tmp_path, llama_3_split):
    base = save_meta(tmp_path / "base", tiny[1], shards=2, llama_3_split=llama_3_split)
    (base / "tokenizer.model").write_bytes(b"whatever")
    merge_lora(MergeOptions(base, tiny_adapter, tmp_path / "out"))
    assert (tmp_path / "out" / "params.json").read_bytes() == (base / "params.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"whatever"
    for shard in range(2):
        name = f"consolidated.{shard:02d}.pth"
        before, after = (torch.load(d / name, weights_only=True, mmap=True) for d in (base, tmp_path / "out"))
        assert set(after) == set(before) - {"rope.freqs"}
        for key, tensor in after.items():
            assert torch.equal(tensor, before[key]) is not key.endswith(("wq.weight", "wv.weight")), key


@pytest.mark.parametrize("tied", [False, True])
def test_huggingface_to_meta_and_back_is_bit_identical(tmp_path, tied):
    model = save_tiny(tmp_path / "base", tied=tied, dtype=torch.float16)
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj", "k_proj"])
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in stored.items()},
              adapter / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "meta", "meta"))
    merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "direct", "hf"))
    independent = {**meta_state(model)}
    written = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert {name: tensor.dtype for name, tensor in written.items()} == dict.fromkeys(independent, torch.float16)
    assert all(torch.equal(written[name], independent[name]) for name in independent)
    (tmp_path / "meta" / "llamatune.json").unlink()
    merge_lora(MergeOptions(tmp_path / "meta", adapter, tmp_path / "back", "hf"))
    back, first = open_checkpoint(tmp_path / "back"), open_checkpoint(tmp_path / "base")
    assert all(torch.equal(back.tensor(name), first.tensor(name)) for name in first.shapes)
    assert fingerprint(back) == fingerprint(first)
    with torch.no_grad():
        one, two, three = (
            LlamaForCausalLM.from_pretrained(tmp_path / path)(TOKENS).logits for path in ("base", "back", "direct")
        )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("base", ["hf", "meta", "meta without a head"])
@pytest.mark.parametrize("format_", ["hf", "meta"])
def test_tied_models_are_merged_into_tied_models(tmp_path, base, format_):
    model = save_tiny(tmp_path / "hf", tied=True)
    source = tmp_path / "hf" if base == "hf" else save_meta(tmp_path / "meta", model)
    if base == "meta without a head":
        state = torch.load(source / "consolidated.00.pth", weights_only=True)
        del state["output.weight"]
        torch.save(state, source / "consolidated.00.pth")
    adapter = save_peft(tmp_path / "adapter", tmp_path / "hf", list(LINEAR_MODULES))
    events = []
    merge_lora(MergeOptions(source, adapter, tmp_path / "out", format_), events.append)
    warned = any(isinstance(event, Notice) and "no output.weight" in event.message for event in events)
    assert warned is (base == "meta without a head")
    expected = judged(tmp_path / "hf", adapter)
    merged = open_checkpoint(tmp_path / "out")
    head = merged.tensor("lm_head.weight" if "lm_head.weight" in merged.shapes else "model.embed_tokens.weight")
    assert torch.equal(head, expected.state_dict()["lm_head.weight"])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), expected(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_rounded_once_and_the_report_counts_it(tmp_path):
    save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj", "down_proj"])
    stored = load_adapter(adapter)
    for name, tensor in stored.tensors.items():
        if "lora_B" in name:
            tensor.mul_(0.02)
    save_adapter(adapter, stored, overwrite=True)
    report = merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out"))
    base, merged = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "out")
    worst = changed = vanished = 0.0
    for name in base.shapes:
        matrices = stored.trained(name)
        W = base.tensor(name)
        if not matrices:
            assert torch.equal(merged.tensor(name), W)
            continue
        exact = W.float() + stored.config.scaling() * (matrices[1] @ matrices[0])
        assert torch.equal(merged.tensor(name), exact.bfloat16())
        worst = max(worst, (exact.bfloat16().float() - exact).abs().max().item())
        changed += (exact != W.float()).sum().item()
        vanished += ((exact != W.float()) & (exact.bfloat16() == W)).sum().item()
    assert report.max_abs_error == pytest.approx(worst)
    assert 0.01 < vanished / changed < 0.99
    assert report.vanished_fraction == pytest.approx(vanished / changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format_", ["hf", "meta"])
def test_dtype_changes_weights_and_configuration(tiny, tiny_adapter, tmp_path, dtype, format_):
    merge_lora(MergeOptions(tiny[0], tiny_adapter, tmp_path / "out", format_, dtype))
    merged = open_checkpoint(tmp_path / "out")
    kind = getattr(torch, dtype)
    assert {merged.dtype(name) for name in merged.shapes} == {kind}
    exact = judged(tiny[0], tiny_adapter).state_dict()
    for name in merged.shapes:
        torch.testing.assert_close(
            merged.tensor(name), exact[name].to(kind), rtol=0, atol=1e-6 if dtype == "float32" else 1e-2
        )
    if format_ == "hf":
        assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == kind


def test_float16_overflow_names_the_tensor(tmp_path):
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        base = tmp_path / name
        save_tiny(base)
        weights = load_file(base / "model.safetensors")
        weights[name].view(-1)[5] = 1e5
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        adapter = save_peft(tmp_path / "adapter", base, ["q_proj"])
        with pytest.raises(CheckpointError, match=f"{name} holds 100000, which float16 cannot hold"):
            merge_lora(MergeOptions(base, adapter, tmp_path / "out", dtype="float16"))
        assert not (tmp_path / "out").exists()


def test_nan_in_the_base_is_a_warning(tmp_path):
    save_tiny(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj"])
    events = []
    report = merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out"), events.append)
    assert any(isinstance(e, Notice) and "q_proj.weight holds NaN" in e.message for e in events)
    assert report.max_abs_error == 0


def test_finished_merge_is_left_alone_and_another_one_is_refused(tiny, tiny_adapter, tmp_path):
    options = MergeOptions(tiny[0], tiny_adapter, tmp_path / "out")
    first = merge_lora(options)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}
    again = merge_lora(options)
    assert again.already_done
    assert dataclasses.replace(again, already_done=False) == first
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}
    other = dataclasses.replace(options, dtype="bfloat16")
    with pytest.raises(EnvironmentFault, match="not empty"):
        merge_lora(other)
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").iterdir()}
    assert merge_lora(dataclasses.replace(other, overwrite=True)).dtype == "bfloat16"


def test_same_inputs_give_the_same_bytes(tiny, tiny_adapter, tmp_path):
    for format_ in ("hf", "meta"):
        for number in (1, 2):
            merge_lora(MergeOptions(tiny[0], tiny_adapter, tmp_path / f"{format_}{number}", format_))
        one, two = files_of(tmp_path / f"{format_}1"), files_of(tmp_path / f"{format_}2")
        one.pop("llamatune.json"), two.pop("llamatune.json")  # tells its own place
        assert one == two


def test_adapter_is_not_merged_twice_n9(tiny, tiny_adapter, tmp_path):
    merge_lora(MergeOptions(tiny[0], tiny_adapter, tmp_path / "one"))
    for force in (False, True):
        with pytest.raises(CheckpointError, match="already merged"):
            merge_lora(MergeOptions(tmp_path / "one", tiny_adapter, tmp_path / "two", force_base=force))
    other = save_peft(tmp_path / "other", tmp_path / "one", ["k_proj"])
    merge_lora(MergeOptions(tmp_path / "one", other, tmp_path / "two"))
    with pytest.raises(CheckpointError, match="already merged"):
        merge_lora(MergeOptions(tmp_path / "two", tiny_adapter, tmp_path / "three"))


def test_facts_for_readers_of_the_merged_model(tiny, tiny_adapter, tmp_path):
    adapter = dataclasses.replace(load_adapter(tiny_adapter), template={"name": "alpaca"})
    save_adapter(tmp_path / "adapter", adapter)
    merge_lora(MergeOptions(tiny[0], tmp_path / "adapter", tmp_path / "out"))
    facts = json.loads((tmp_path / "out" / "llamatune.json").read_text())["facts"]
    assert facts["template"] == {"name": "alpaca"}
    assert facts["adapters"] == [load_adapter(tmp_path / "adapter").digest]
    assert facts["base_fingerprint"] == fingerprint(open_checkpoint(tiny[0]))


def test_stopping_at_every_tensor_leaves_nothing_c22(tiny, tiny_adapter, tmp_path):
    for format_ in ("hf", "meta"):
        for stop_at in range(0, 21, 5):
            seen = []
            with pytest.raises(Stopped):
                merge_lora(
                    MergeOptions(tiny[0], tiny_adapter, tmp_path / "out", format_),
                    lambda event, seen=seen: seen.append(event),
                    lambda seen=seen, stop_at=stop_at: sum(isinstance(e, Progress) for e in seen) >= stop_at,
                )
            assert list(tmp_path.iterdir()) == []
    merge_lora(MergeOptions(tiny[0], tiny_adapter, tmp_path / "out"))


def test_small_disk_is_noticed_before_work(tiny, tiny_adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1234))
    with pytest.raises(EnvironmentFault, match=r"needs [\d,]+ bytes and 1,234 are free"):
        merge_lora(MergeOptions(tiny[0], tiny_adapter, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["base", "adapter", "parent"])
def test_inputs_are_not_overwritten(tiny, tiny_adapter, tmp_path, place):
    shutil.copytree(tiny[0], tmp_path / "base")
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    output = tmp_path if place == "parent" else tmp_path / place
    with pytest.raises(SpecError, match="would replace"):
        merge_lora(MergeOptions(tmp_path / "base", tmp_path / "adapter", output, overwrite=True))
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_contradicted_tie_flag_is_corrected(tmp_path):
    save_tiny(tmp_path / "base", tied=True)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj"])
    merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs.lm_head.weight, weights["lm_head.weight"])


def test_meta_cannot_express_a_head_dimension_of_its_own(tmp_path):
    save_tiny(tmp_path / "base", head_dim=16)
    adapter = save_peft(tmp_path / "adapter", tmp_path / "base", ["q_proj", "o_proj"])
    with pytest.raises(CheckpointError, match="head_dim 16"):
        merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out", "meta"))
    merge_lora(MergeOptions(tmp_path / "base", adapter, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "out")(TOKENS),
            judged(tmp_path / "base", adapter)(TOKENS).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_live_model_written_in_shards_opens_in_transformers(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_files, "_SHARD_BYTES", 20_000)
    model = load_model(tiny[0])
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    for number, given in enumerate((model.state_dict().__getitem__, model.get_parameter)):
        out = tmp_path / str(number)
        out.mkdir()
        huggingface_weights.write_huggingface(
            Staging(out), model.config, given, lambda name: torch.float32, tmp_path, ignore_event
        )
        assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
        theirs = LlamaForCausalLM.from_pretrained(out)
        assert all(torch.equal(theirs.state_dict()[n], tensor) for n, tensor in tiny[1].state_dict().items())
        written = json.loads((out / "config.json").read_text())
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
        assert written["dtype"] == written["torch_dtype"] == "float32"
        assert theirs.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("long", [False, True])
def test_archive_is_read_by_torch_and_zip(tiny, tiny_adapter, tmp_path, monkeypatch, long):
    """``long`` puts every size and offset into the fields that archives beyond 4 GiB need."""
    if long:
        monkeypatch.setattr(torch_archive_writer, "_LARGEST_SHORT", 0)
        real = struct.pack
        fields = {"<HHQQ": (), "<4sHHHHHIIIHH": (7, 8), "<4sHHHHHHIIIHH": (8, 9), "<HHHII": (4,), "<4sHHHHIIH": (6,)}

        def pack(layout, *values):
            marked = [0xFFFFFFFF if i in fields.get(layout, ()) else value for i, value in enumerate(values)]
            return real(layout, *marked)

        monkeypatch.setattr(torch_archive_writer.struct, "pack", pack)
    out = tmp_path / "out"
    merge_lora(MergeOptions(tiny[0], tiny_adapter, out, "meta"))
    monkeypatch.undo()
    path = out / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                assert (info.header_offset + 30 + name + extra) % 64 == 0
    ours = open_checkpoint(out)
    mapped, plain = (torch.load(path, weights_only=True, mmap=mmap) for mmap in (True, False))
    assert all(torch.equal(mapped[name], plain[name]) for name in plain)
    assert torch.equal(plain["layers.0.attention.wo.weight"], ours.tensor("model.layers.0.self_attn.o_proj.weight"))


def test_fixture_model_and_adapter(shared_fixtures, tmp_path):
    hf, meta = shared_fixtures / "stories260K-hf", shared_fixtures / "stories260K-meta"
    adapter = shared_fixtures / "peft-adapter-qv"
    state = judged(hf, adapter).state_dict()
    for base in (hf, meta):
        for format_ in ("hf", "meta"):
            out = tmp_path / f"{base.name}-{format_}"
            merge_lora(MergeOptions(base, adapter, out, format_))
            merged = open_checkpoint(out)
            for name in merged.shapes:
                torch.testing.assert_close(merged.tensor(name), state[name], rtol=0, atol=1e-6)

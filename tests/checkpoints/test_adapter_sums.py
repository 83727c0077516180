"""Several adapters: PEFT's sum of them, merged and unmerged, with weights; what cannot be summed is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.adapter_sum import load_adapters, weighted_sum
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.inference import EvaluateOptions, MergeOptions, ModelSource
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.tokenizers.loading import load_tokenizer

from .conftest import save_adapter, save_peft, save_tiny

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Adapters of several ranks, scalings and modules for the tiny model."""
    root = tmp_path_factory.mktemp("adapters")
    save_peft(root / "qv", tiny[0], ["q_proj", "v_proj"], r=4, alpha=8)
    save_peft(root / "vd", tiny[0], ["v_proj", "down_proj"], r=3, alpha=5, use_rslora=True)
    save_peft(root / "one layer", tiny[0], ["v_proj"], r=2, layers_to_transform=[1])
    save_peft(root / "dora", tiny[0], ["q_proj"], use_dora=True)
    save_peft(root / "head", tiny[0], ["q_proj"], modules_to_save=["lm_head"])
    return root


def judged(base, adapters, weights):
    """PEFT's logits with these adapters added up by rank, and with all of them active where no weight is given."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapters[0], adapter_name="0")
    names = [str(number) for number in range(len(adapters))]
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    if weights is None:
        model.base_model.set_adapter(names)
    else:
        model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
        model.set_adapter("sum")
    with torch.no_grad():
        return model.eval()(TOKENS).logits


CASES = [
    (["qv", "vd"], None),
    (["qv", "vd"], (0.7, 0.3)),
    (["qv", "vd", "one layer"], (1.0, -0.5, 2.0)),
    (["qv"], (0.5,)),
]


@pytest.mark.parametrize(("names", "weights"), CASES)
def test_the_sum_is_pefts_merged_and_beside_the_base(tiny, made, tmp_path, names, weights):
    adapters = [made / name for name in names]
    expected = judged(tiny[0], adapters, weights)
    source = ModelSource(tiny[0], adapters, compare=True, weights=weights, device="cpu")
    models = open_model(source).load(ignore_event, never_stop).by_prefix
    report = merge_lora(MergeOptions(tiny[0], adapters, tmp_path / "out", weights=weights))
    with torch.no_grad():
        base = tiny[1](TOKENS).logits
        assert (expected - base).abs().max() > 0.01
        torch.testing.assert_close(models[""](TOKENS), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(models["base_"](TOKENS), base, rtol=0, atol=1e-4)
        torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), expected, rtol=0, atol=1e-4)
    changed = {module for name in names for module in load_adapter(made / name).config.modules}
    assert report.merged_tensors == 2 * len(changed)


def test_it_is_rounded_once(made, tmp_path):
    base = tmp_path / "base"
    save_tiny(base, dtype=torch.bfloat16)
    adapters = [load_adapter(made / name) for name in ("qv", "vd")]
    options = MergeOptions(base, [made / "qv", made / "vd"], tmp_path / "out", weights=(0.7, 0.3), force_base=True)
    merge_lora(options)
    name = "model.layers.1.self_attn.v_proj.weight"
    exact = open_checkpoint(base).tensor(name).double()
    for adapter, weight in zip(adapters, (0.7, 0.3), strict=True):
        A, B = (tensor.double() for tensor in adapter.trained(name))
        exact += weight * adapter.scaling(name) * (B @ A)
    merged = open_checkpoint(tmp_path / "out").tensor(name)
    assert ((merged.double() - exact).abs() <= exact.abs() * 2.0**-8 * (1 + 1e-4)).all()


def test_manifest_lists_all_and_a_second_merge_of_one_is_refused(tiny, made, tmp_path):
    options = MergeOptions(tiny[0], [made / "qv", made / "vd"], tmp_path / "out", weights=(0.7, 0.3))
    first = merge_lora(options)
    digests = [load_adapter(made / name).digest for name in ("qv", "vd")]
    manifest = json.loads((tmp_path / "out" / "llamatune.json").read_text())
    assert manifest["facts"]["adapters"] == digests
    stated = [(adapter["sha256"], adapter["weight"]) for adapter in manifest["inputs"]["adapters"]]
    assert stated == list(zip(digests, (0.7, 0.3), strict=True))
    assert dataclasses.replace(merge_lora(options), already_done=False) == first
    with pytest.raises(CheckpointError, match="vd is already merged"):
        merge_lora(MergeOptions(tmp_path / "out", [made / "one layer", made / "vd"], tmp_path / "again"))


def test_one_adapter_of_weight_one_is_merged_as_without_weights(tiny, made, tmp_path):
    for name, weights in (("plain", None), ("weighted", (1.0,))):
        merge_lora(MergeOptions(tiny[0], [made / "qv"], tmp_path / name, weights=weights))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "weighted"))
    assert one == two


@pytest.mark.parametrize(("name", "match"), [("dora", "its kind is dora"), ("head", "it changes lm_head.weight")])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_cannot_be_summed_is_refused_by_name(tiny, made, tmp_path, name, match, weighted):
    paths, weights = ([made / name], (0.5,)) if weighted else ([made / "qv", made / name], None)
    with pytest.raises(CheckpointError, match=f"{name}: .*{match}|{match}"):
        merge_lora(MergeOptions(tiny[0], paths, tmp_path / "out", weights=weights))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=match):
        open_model(ModelSource(tiny[0], paths, weights=weights, device="cpu"))


def test_the_same_adapter_twice_is_refused(tiny, made, tmp_path):
    with pytest.raises(SpecError, match="given twice"):
        merge_lora(MergeOptions(tiny[0], [made / "qv", made / "qv"], tmp_path / "out"))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_weights_and_adapters_are_as_many(made, weights):
    adapters, match = [made / "qv", made / "vd"], f"--weights has {len(weights)} numbers for 2 adapters"
    for make in (
        lambda: MergeOptions(made, adapters, made / "out", weights=weights),
        lambda: GenerateOptions(model=made, adapter=adapters, weights=weights),
        lambda: EvaluateOptions(model=made, adapter=adapters, weights=weights, data=made),
    ):
        with pytest.raises(SpecError, match=match):
            make()
    with pytest.raises(SpecError, match="--weights has 1 numbers for 0 adapters"):
        ModelSource(made, weights=(1.0,))


def test_templates_that_differ_are_refused_unless_one_is_chosen(tiny, made, tiny_tokenizer, tmp_path):
    base, tokenizer, adapters = tmp_path / "base", load_tokenizer(tiny_tokenizer), {}
    shutil.copytree(tiny[0], base)
    shutil.copy(tiny_tokenizer, base)
    for name, template in (("qv", "alpaca"), ("vd", "text"), ("one layer", None)):
        values = template and {"name": template, "prompt": "{prompt}"}
        adapters[name] = tmp_path / "adapters" / name
        save_adapter(adapters[name], dataclasses.replace(load_adapter(made / name), template=values))
    both, out = [adapters["qv"], adapters["vd"]], tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"vd: was trained with another template .*qv: .*--template|--template"):
        merge_lora(MergeOptions(base, both, out))
    assert not out.exists()
    opened = open_model(ModelSource(base, both, device="cpu"))
    with pytest.raises(CheckpointError, match="choose one with --template"):
        opened.template(None, tokenizer, ignore_event)
    chosen = opened.template("alpaca", tokenizer, ignore_event)
    assert chosen is not None
    merge_lora(MergeOptions(base, both, out, template="alpaca"))
    assert open_model(ModelSource(out, device="cpu")).template(None, tokenizer, ignore_event) == chosen
    merge_lora(MergeOptions(base, [adapters["one layer"], adapters["vd"]], tmp_path / "known"))
    stored = json.loads((tmp_path / "known" / "llamatune.json").read_text())["facts"]["template"]
    assert stored["name"] == "text"


def test_the_command_line_takes_adapters_and_their_weights(tiny, made, tmp_path, command):
    asked = ("--model", tiny[0], "--adapter", made / "qv", "--adapter", made / "vd")
    done = command("merge-lora", *asked, "--weights", "0.7,0.3", "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    merge_lora(MergeOptions(tiny[0], [made / "qv", made / "vd"], tmp_path / "judge", weights=(0.7, 0.3)))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "judge"))
    assert one == two
    for verb, more in (("merge-lora", ("--output", tmp_path / "x")), ("generate", ("--prompt", "a"))):
        for weights, said in (("0.7", "has 1 numbers for 2"), ("a,b", "such as 0.7,0.3"), ("nan,1", "must be finite")):
            refused = command(verb, *asked, *more, "--weights", weights)
            assert (refused.code, refused.stdout) == (2, ""), refused.stderr
            assert said in refused.stderr


def test_ranks_lie_side_by_side(tiny, made):
    adapters = load_adapters([made / "qv", made / "one layer"])
    summed = weighted_sum(adapters, (0.5, 2.0))
    shapes = {name: tuple(tensor.shape) for name, tensor in summed.tensors.items()}
    assert shapes["model.layers.0.self_attn.v_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.1.self_attn.v_proj.lora_A.weight"] == (6, 32)
    assert shapes["model.layers.1.self_attn.v_proj.lora_B.weight"] == (16, 6)
    assert shapes == dict(summed.config.checkpoint_shapes(open_checkpoint(tiny[0]).config))


def test_a_sum_beyond_fp32_is_refused_and_not_blamed_on_the_base(tiny, made, tmp_path):
    for weights in ((1e39, 1.0), (1e40, -1e40)):
        with pytest.raises(CheckpointError, match=r"would hold NaN or infinity.*--weights"):
            merge_lora(MergeOptions(tiny[0], [made / "qv", made / "vd"], tmp_path / "out", weights=weights))
        assert not (tmp_path / "out").exists()


def test_the_same_tensors_with_another_scaling_are_another_adapter(made, tmp_path):
    shutil.copytree(made / "qv", tmp_path / "twice")
    config = tmp_path / "twice" / "adapter_config.json"
    with pytest.raises(SpecError, match="given twice"):
        load_adapters([made / "qv", tmp_path / "twice"])
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 16}))
    one, other = load_adapters([made / "qv", tmp_path / "twice"])
    assert one.digest == other.digest

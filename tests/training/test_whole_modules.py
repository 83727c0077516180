"""``lora.modules_to_save``: embedding, head and final norm trained whole, as PEFT trains and writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_run import Trace, kept_rows, reference_run
from run_tools import adapter_tensors, losses, make_spec, metrics
from safetensors.torch import load_file

from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions, ModelSource
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.shapes.counts import count_parameters
from llamatune.spec import RunSpec
from llamatune.training.inputs import open_inputs
from llamatune.training.model_and_optimizer import build_learner
from llamatune.training.train import train

IDS = torch.arange(3, 63).view(2, 30)
PREFIX = "base_model.model."
NAMES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", "norm": "model.norm"}
STEPS, RATE, DECAY = 3, 0.01, 0.1

SpecOf = Callable[..., RunSpec]


@pytest.fixture
def spec_of(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> SpecOf:
    def make(whole: list[str], tied: bool = False, name: str = "run", **changes: Any) -> RunSpec:
        lora = {"r": 4, "alpha": 8, "dropout": 0.0, "modules_to_save": whole}
        training = {
            "training__max_steps": STEPS, "training__learning_rate": RATE, "training__weight_decay": DECAY,
            "training__micro_batch_size": 2, "data__shuffle": False,
        }  # fmt: skip
        base = tiny_base(tie_word_embeddings=tied)
        return make_spec(base, prepared(), tmp_path / name, **{"lora": lora, **training, **changes})

    return make


def of_peft(spec: RunSpec, whole: list[str], max_grad_norm: float | None = 1.0) -> tuple[torch.nn.Module, Trace]:
    """The same run from the same A, by PEFT, and its model in the end."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    start = build_learner(spec, open_inputs(spec, False, ignore_event), ignore_event, never_stop).parameters
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                        modules_to_save=["model.norm" if name == "norm" else name for name in whole])  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(spec.model.path, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(start[plain(name)])
    trace = reference_run(
        model, kept_rows(Path(spec.data.train)), lambda p: torch.optim.AdamW(p, lr=1, weight_decay=DECAY),
        lambda step: RATE, STEPS, max_grad_norm, 2, 2,
    )  # fmt: skip
    return model.eval(), trace


def plain(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".default", "")


CASES = [
    (["embed_tokens", "lm_head"], False),
    (["embed_tokens", "lm_head", "norm"], False),
    (["norm"], False),
    (["lm_head"], True),
    (["embed_tokens"], True),
    (["embed_tokens", "lm_head", "norm"], True),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(("whole", "tied"), CASES, ids=lambda value: str(value))
def test_three_steps_are_those_of_peft_which_opens_what_is_written(
    spec_of: SpecOf, tmp_path: Path, whole: list[str], tied: bool, fused: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = spec_of(whole, tied, training__fused=fused)
    train(spec)
    run, base = tmp_path / "run", Path(spec.model.path)
    model, reference = of_peft(spec, whole)
    assert losses(run) == pytest.approx(reference.losses, abs=1e-5)
    assert [line["grad_norm"] for line in metrics(run, "step")] == pytest.approx(reference.grad_norms, rel=1e-4)
    found = {plain(name): tensor for name, tensor in adapter_tensors(run / "adapter").items()}
    expected = {plain(name): tensor for name, tensor in reference.trained.items()}
    assert found.keys() == expected.keys()
    assert {name for name in found if "lora_" not in name} == {f"{NAMES[name]}.weight" for name in whole}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
        assert found[name].dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        of_base = again(IDS).logits
        opened = PeftModel.from_pretrained(again, run / "adapter").eval()(IDS).logits
        torch.testing.assert_close(opened, model(IDS).logits, atol=1e-3, rtol=0)
        assert (opened - of_base).abs().max() > 0.01
        ours = open_model(ModelSource(model=base, adapter=run / "adapter", device="cpu")).load(ignore_event, never_stop)
        torch.testing.assert_close(ours.by_prefix[""](IDS), opened, atol=1e-4, rtol=0)
        merge_lora(MergeOptions(base, run / "adapter", tmp_path / "merged", "same"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(IDS).logits, opened, atol=1e-4, rtol=0)


def test_the_names_on_disk_are_those_of_peft(spec_of: SpecOf, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    whole = ["norm", "lm_head", "embed_tokens"]
    spec = spec_of(whole)
    train(spec)
    model, _ = of_peft(spec, whole)
    written = adapter_tensors(tmp_path / "run" / "adapter")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()
    }
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head", "model.norm"]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("bfloat16", "bf16"), ("bfloat16", "fp32"), ("nf4", "bf16"), ("float8", "bf16"), ("float16", "fp16")],
)
def test_masters_are_fp32_on_a_base_of_any_dtype(spec_of: SpecOf, tmp_path: Path, dtype: str, precision: str) -> None:
    spec = spec_of(["embed_tokens", "lm_head", "norm"], model__dtype=dtype, training__precision=precision,
                   training__learning_rate=1e-5, training__weight_decay=0.0)  # fmt: skip
    learner = build_learner(spec, open_inputs(spec, False, ignore_event), ignore_event, never_stop)
    names = {f"{name}.weight" for name in NAMES.values()}
    frozen = {one.dtype for name, one in learner.model.named_parameters() if "lora_" not in name and name not in names}
    assert torch.float32 not in frozen
    before = {name: learner.parameters[name].detach().clone() for name in names}
    train(spec)
    after = {plain(name): one for name, one in adapter_tensors(tmp_path / "run" / "adapter").items()}
    for name in names:
        moved = (after[name] - before[name]).abs()
        assert 0 < moved.max() < 1e-4  # steps that bf16 would lose
        assert (after[name].bfloat16() != before[name].bfloat16()).float().mean() < 0.5


def test_the_rate_of_lora_plus_is_not_theirs(spec_of: SpecOf, tmp_path: Path) -> None:
    """As in PEFT, whose optimizer puts them beside A."""
    whole = ["embed_tokens", "lm_head"]
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "modules_to_save": whole}
    for ratio in (1.0, 16.0):
        train(spec_of(whole, name=str(ratio), lora={**lora, "lr_ratio": ratio}, training__max_steps=1))
    one, other = (adapter_tensors(tmp_path / name / "adapter") for name in ("1.0", "16.0"))
    same = {plain(name) for name in one if torch.equal(one[name], other[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= same
    assert not [name for name in same if "lora_B" in name]


def test_streamed_blocks_and_recomputation_change_no_bit(spec_of: SpecOf, tmp_path: Path) -> None:
    whole = ["embed_tokens", "lm_head", "norm"]
    changes: dict[str, dict[str, Any]] = {
        "device": {}, "host": {"model__placement": "host"}, "block": {"training__activation_checkpointing": "block"},
    }  # fmt: skip
    for name, change in changes.items():
        train(spec_of(whole, name=name, **change))
    files = {(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in changes}
    assert len(files) == 1


def test_a_checkpoint_holds_them_and_the_optimizer_state(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(["embed_tokens", "lm_head"], training__optimizer="adamw_8bit")
    train(spec)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    state = load_file(checkpoint / "optimizer.safetensors")
    vocabulary, width = adapter_tensors(checkpoint)[f"{PREFIX}lm_head.weight"].shape
    assert state["lm_head.weight/exp_avg"].dtype == torch.uint8
    assert state["lm_head.weight/exp_avg"].numel() >= vocabulary * width


def test_parameters_are_counted(spec_of: SpecOf) -> None:
    plain_count, whole = (open_inputs(spec_of(names), False, ignore_event) for names in ([], ["embed_tokens", "norm"]))
    config = whole.config
    more = config.vocab_size * config.hidden_size + config.hidden_size
    assert whole.count.trainable_parameters == plain_count.count.trainable_parameters + more
    assert whole.count.total_parameters == plain_count.count.total_parameters + more
    assert whole.count.modules["model.norm"] == {"base": config.hidden_size, "adapter": config.hidden_size}
    assert whole.count.base_parameters == count_parameters(config).base_parameters


REFUSED = [
    (["o_proj"], "lora.modules_to_save: 'o_proj' cannot be trained whole; there are embed_tokens, lm_head, norm"),
    (["model.norm"], "'model.norm' cannot be trained whole"),
    (["lm_head", "lm_head"], "lora.modules_to_save: names a module twice"),
    ([3], "3 cannot be trained whole"),
    ([["lm_head"]], r"\['lm_head'\] cannot be trained whole"),
    ("lm_head, mlp", "'mlp' cannot be trained whole"),
    (7, "lora.modules_to_save: "),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=str)
def test_other_modules_are_refused(spec_of: SpecOf, value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(value)


def test_an_adapter_is_no_start_with_them_nor_with_such(spec_of: SpecOf, tmp_path: Path) -> None:
    train(spec_of(["lm_head"], training__max_steps=1))
    start = {"r": 4, "alpha": 8, "dropout": 0.0, "init_from": str(tmp_path / "run" / "adapter")}
    with pytest.raises(CheckpointError, match=r"also changes lm_head.weight of the base.*merge it into the base"):
        train(spec_of([], name="next", lora=start))
    with pytest.raises(SpecError, match="init_from and modules_to_save exclude each other"):
        spec_of([], name="next", lora={**start, "modules_to_save": ["norm"]})

"""Each kind of adapter trained by us and by PEFT: losses, gradients' norms, and what is trained in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_run import Trace, kept_rows, reference_run, schedule_value
from run_tools import adapter_tensors, losses, make_spec, metrics

from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.training.train import train

STEPS, RATE = 3, 0.01
SCHEDULE = ("cosine", RATE, 0.001, 1)


@dataclass(frozen=True)
class Case:
    """``lora`` of our spec, ``config`` of PEFT's; ``ratio`` of LoRA+, ``frozen`` what PEFT is told not to train."""

    lora: dict[str, Any]
    config: dict[str, Any]
    ratio: float = 1.0
    frozen: str = "nothing"
    optimizer: str = "adamw"
    training: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dora": Case({"kind": "dora"}, {"use_dora": True}),
    "dora, lora+": Case({"kind": "dora", "lr_ratio": 8.0}, {"use_dora": True}, 8.0),
    "rslora": Case({"use_rslora": True}, {"use_rslora": True}),
    "ranks and alphas": Case(
        {"ranks": {"q_proj": 2, "down_proj": 7}, "alphas": {"v_proj": 3.0, "down_proj": 5.0}},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3, "down_proj": 5}},
    ),
    "lora+, decay": Case({"lr_ratio": 16.0}, {}, 16.0, training={"weight_decay": 0.1}),
    "lora+, sgd": Case({"lr_ratio": 4.0}, {}, 4.0, optimizer="sgd", training={"momentum": 0.9, "weight_decay": 0.1}),
    "lora_fa": Case({"kind": "lora_fa"}, {}, frozen="lora_A"),
}


def judge(model: torch.nn.Module, prepared: Path, case: Case) -> Trace:
    from peft.optimizers import create_loraplus_optimizer

    for name, parameter in model.named_parameters():
        if case.frozen in name:
            parameter.requires_grad_(False)
    decay = case.training.get("weight_decay", 0.0)

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
        more = {"momentum": case.training["momentum"]} if case.optimizer == "sgd" else {}
        made = create_loraplus_optimizer(
            model, kind, lr=1.0, loraplus_lr_ratio=case.ratio, loraplus_weight_decay=decay, **more
        )
        ratios = [group["lr"] for group in made.param_groups]

        def scale(*_: Any) -> None:  # the reference sets one rate for all
            for group, ratio in zip(made.param_groups, ratios, strict=True):
                group["lr"] *= ratio

        made.register_step_pre_hook(scale)
        return made

    return reference_run(
        model, kept_rows(prepared), optimizer, lambda step: schedule_value(*SCHEDULE, STEPS, step), STEPS, None, 2, 2
    )


def ours(base: Path, prepared: Path, output: Path, case: Case, **lora: Any) -> Path:
    kind, rate, floor, warmup = SCHEDULE
    spec = make_spec(
        base, prepared, output,
        lora={"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": list(LINEAR_MODULES), **case.lora, **lora},
        data__shuffle=False,
        training={
            "output_dir": str(output), "max_steps": STEPS, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
            "precision": "fp32", "device": "cpu", "max_grad_norm": None, "optimizer": case.optimizer,
            "learning_rate": rate, "lr_scheduler": kind, "min_learning_rate": floor, "warmup_steps": warmup,
            **case.training,
        },
    )  # fmt: skip
    train(spec)
    return output


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_three_steps_are_those_of_peft(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    case: Case,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, data = tiny_base(), prepared()
    adapter = peft_adapter(base, list(LINEAR_MODULES), r=4, alpha=8, scale=0.1, **case.config)
    run = ours(base, data, tmp_path / "run", case, init_from=str(adapter))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    reference = judge(peft, data, case)
    assert losses(run) == pytest.approx(reference.losses, abs=2e-5)
    assert [line["grad_norm"] for line in metrics(run, "step")] == pytest.approx(reference.grad_norms, rel=1e-3)
    found = adapter_tensors(run / "adapter")
    expected = {name.replace(".default.weight", ".weight"): one for name, one in reference.trained.items()}
    expected = {name.replace("vector.weight", "vector"): one for name, one in expected.items()}
    before = adapter_tensors(adapter)
    assert found.keys() == before.keys()
    assert len(expected) == len([name for name in found if case.frozen not in name])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]), atol=3e-4, rtol=1e-3, msg=name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    written, given = (json.loads((path / "adapter_config.json").read_text()) for path in (run / "adapter", adapter))
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "r", "lora_alpha"):
        assert written[key] == given[key]


def update(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    return B @ A


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_starts_from_the_base_train_as_in_peft_and_are_written_as_plain_lora(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, init: str, rslora: bool
) -> None:
    """PEFT subtracts the first B A from the base; what both have changed of W is the same."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base, data = tiny_base(), prepared()
    case = Case({"init": init, "use_rslora": rslora}, {})
    run = ours(base, data, tmp_path / "run", case)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(LINEAR_MODULES), init_lora_weights=init, use_rslora=rslora
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.arange(3, 63).view(2, 30)
    with torch.no_grad():
        of_base = plain(ids).logits
        again = PeftModel.from_pretrained(plain, run / "adapter").eval()(ids).logits
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    first = {name.replace(".default", ""): one.clone() for name, one in peft.state_dict().items() if "lora" in name}
    with torch.no_grad():
        torch.testing.assert_close(peft.eval()(ids).logits, of_base, atol=1e-4, rtol=0)
    reference = judge(peft, data, case)
    assert losses(run) == pytest.approx(reference.losses, abs=2e-5)
    assert [line["grad_norm"] for line in metrics(run, "step")] == pytest.approx(reference.grad_norms, rel=1e-3)
    found = adapter_tensors(run / "adapter")
    last = {name.replace(".default", ""): one for name, one in reference.trained.items()}
    stems = {name.removesuffix(".lora_A.weight") for name in found if "lora_A" in name}
    assert len(stems) == 7 * 3
    for stem in stems:
        assert len(found[f"{stem}.lora_A.weight"]) == 8
        torch.testing.assert_close(update(found, stem), update(last, stem) - update(first, stem), atol=2e-4, rtol=1e-3)
    written = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 8
    assert written["lora_alpha"] == (pytest.approx(8 * 2**0.5) if rslora else 16)
    with torch.no_grad():
        torch.testing.assert_close(again, peft.eval()(ids).logits, atol=2e-3, rtol=0)
    assert (again - of_base).abs().max() > 0.02

"""Twenty steps of ours and twenty of transformers with PEFT: the same losses, the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_run import Trace, kept_rows, reference_run, schedule_value
from run_tools import adapter_tensors, losses, make_spec, metrics

from llamatune.training.train import train

STEPS = 20


@dataclass(frozen=True)
class Case:
    """An optimizer and a schedule as the spec says them, and the same as plain torch says it."""

    spec: dict[str, Any]
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    schedule: tuple[str, float, float, int] = ("constant", 0.02, 0.0, 0)
    max_grad_norm: float | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def training(self) -> dict[str, Any]:
        kind, peak, floor, warmup = self.schedule
        values = {
            "lr_scheduler": kind, "learning_rate": peak, "min_learning_rate": floor, "warmup_steps": warmup,
            "max_grad_norm": self.max_grad_norm, "max_steps": STEPS, "micro_batch_size": 2,
            "gradient_accumulation_steps": 2, **self.spec,
        }  # fmt: skip
        return {f"training__{name}": value for name, value in values.items()}


CASES = {
    "sgd": Case({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=1), ("constant", 0.3, 0.0, 0)),
    "sgd with momentum, decay, linear fall": Case(
        {"optimizer": "sgd", "momentum": 0.7, "nesterov": True, "weight_decay": 0.03},
        lambda p: torch.optim.SGD(p, lr=1, momentum=0.7, nesterov=True, weight_decay=0.03),
        ("linear", 0.1, 0.01, 3),
        1.5,
    ),
    "adamw": Case({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, lr=1, weight_decay=0.0)),
    "adamw with decay, cosine, warm-up, clipping": Case(
        {"optimizer": "adamw", "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        ("cosine", 0.02, 0.002, 5),
        0.3,
        {"tie_word_embeddings": True},
    ),
    "llama 3's angles": Case(
        {"optimizer": "adamw"},
        lambda p: torch.optim.AdamW(p, lr=1, weight_decay=0.0),
        changes={"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "a window of 7": Case(
        {"optimizer": "adamw"},
        lambda p: torch.optim.AdamW(p, lr=1, weight_decay=0.0),
        changes={"model_type": "mistral", "sliding_window": 7},
    ),
    "biases, norms of heads": Case(
        {"optimizer": "adamw"},
        lambda p: torch.optim.AdamW(p, lr=1, weight_decay=0.0),
        changes={"model_type": "qwen3", "head_dim": 14, "attention_bias": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def peft_run(base: Path, prepared: Path, adapter: Path, case: Case, max_grad_norm: float | None) -> Trace:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    kind, peak, floor, warmup = case.schedule
    return reference_run(
        adapted, kept_rows(prepared), case.optimizer,
        lambda step: schedule_value(kind, peak, floor, warmup, STEPS, step),
        STEPS, max_grad_norm, micro_batch_size=2, accumulation=2,
    )  # fmt: skip


def assert_same_run(run: Path, reference: Trace) -> None:
    assert losses(run) == pytest.approx(reference.losses, abs=1e-5)
    lines = metrics(run, "step")
    assert [line["learning_rate"] for line in lines] == pytest.approx(reference.learning_rates, rel=1e-9, abs=0)
    assert [line["grad_norm"] for line in lines] == pytest.approx(reference.grad_norms, rel=1e-3)
    trained = adapter_tensors(run / "adapter")
    expected = {name.replace(".default.", "."): tensor for name, tensor in reference.trained.items()}
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            trained[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_twenty_steps_are_those_of_peft(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    case: Case,
) -> None:
    base, data = tiny_base(**case.changes), prepared()
    adapter = peft_adapter(base, ["q_proj", "v_proj"], r=4, alpha=8, scale=0.1)
    spec = make_spec(
        base, data, tmp_path / "run", lora={"r": 4, "alpha": 8, "dropout": 0.0, "init_from": str(adapter)},
        data__shuffle=False, **case.training(),
    )  # fmt: skip
    train(spec)
    reference = peft_run(base, data, adapter, case, case.max_grad_norm)
    assert_same_run(tmp_path / "run", reference)
    assert reference.losses[-1] < reference.losses[0]
    if case.max_grad_norm is not None:
        assert max(reference.grad_norms) > case.max_grad_norm, "clipping was never active"


REAL = {
    "sgd": Case(CASES["sgd"].spec, CASES["sgd"].optimizer, ("constant", 0.05, 0.0, 0), 1.0),
    "adamw": Case(CASES["adamw"].spec, CASES["adamw"].optimizer, ("constant", 2e-3, 0.0, 0), 1.0),
}


@pytest.mark.parametrize(("directory", "optimizer"), [("stories260K-hf", "sgd"), ("stories260K-meta", "adamw")])
def test_twenty_steps_on_real_weights_and_alpaca_are_those_of_peft(
    shared_fixtures: Path, prepared: Callable[..., Path], tmp_path: Path, directory: str, optimizer: str
) -> None:
    """From PEFT's own start, B at zero; of 40 rows 28 are cut to 220 tokens and 3 lose every target token."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    hf, case = shared_fixtures / "stories260K-hf", REAL[optimizer]
    rows = shared_fixtures / "data" / "alpaca_data_200.json"
    data = prepared(rows, hf / "tokenizer.model", max_seq_length=220, limit=40)
    torch.manual_seed(3)
    start = get_peft_model(
        LlamaForCausalLM.from_pretrained(hf), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    start.save_pretrained(tmp_path / "start")
    spec = make_spec(
        shared_fixtures / directory, data, tmp_path / "run",
        lora={"r": 4, "alpha": 8, "dropout": 0.0, "init_from": str(tmp_path / "start")},
        data__shuffle=False, **case.training(),
    )  # fmt: skip
    train(spec)
    assert len(kept_rows(data)) == 37
    assert_same_run(tmp_path / "run", peft_run(hf, data, tmp_path / "start", case, case.max_grad_norm))

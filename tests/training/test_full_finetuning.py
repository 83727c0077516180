"""Training every parameter, starting from drawn weights, starting from an adapter, and training a cut model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_run import collate, kept_rows, reference_run, summed_cross_entropy
from run_tools import adapter_tensors, files, losses, make_spec, metrics
from safetensors.torch import load_file

from llamatune.checkpoints.loading import load_model
from llamatune.training import train as train_module
from llamatune.training.train import train

IDS = torch.tensor([[1, 5, 30, 9, 77, 4, 12, 51], [1, 3, 3, 70, 11, 25, 90, 6]])
SGD = {"training__optimizer": "sgd", "training__learning_rate": 0.05, "training__max_grad_norm": None}


@pytest.mark.parametrize(
    ("format_", "changes"),
    [
        ("hf", {}),
        ("hf", {"tie_word_embeddings": True}),
        ("meta", {}),
        ("hf", {"attention_bias": True, "mlp_bias": True}),
        ("hf", {"model_type": "qwen3", "head_dim": 14, "tie_word_embeddings": True}),
    ],
    ids=["hf", "hf, tied", "meta", "biases", "qwen 3"],
)
def test_full_training_is_that_of_transformers(
    tiny_base: Callable[..., Path],
    meta_copy: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    format_: str,
    changes: dict[str, object],
) -> None:
    """Six steps, loss by loss; and ``model/`` opens in transformers with the very weights that were trained."""
    from transformers import AutoModelForCausalLM

    base, run = tiny_base(**changes), tmp_path / "run"
    spec = make_spec(
        base if format_ == "hf" else meta_copy(base), prepared(), run, lora=None, data__shuffle=False,
        training__max_steps=6, **SGD,
    )  # fmt: skip
    before = files(base)
    train(spec)
    assert files(base) == before
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = reference_run(
        model, kept_rows(prepared()), lambda p: torch.optim.SGD(p, lr=1), lambda _: 0.05, 6, None, 3, 2
    )
    assert losses(run) == pytest.approx(reference.losses, abs=2e-5)
    written = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for name, parameter in written.named_parameters():
        torch.testing.assert_close(parameter.detach(), reference.trained[name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(load_model(run / "model")(IDS), written(IDS).logits, atol=1e-4, rtol=0)
    assert (run / "model" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_the_written_model_is_the_last_one_trained_and_best_the_best(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    learners = []
    build = train_module.build_learner
    monkeypatch.setattr(train_module, "build_learner", lambda *a, **b: learners.append(build(*a, **b)) or learners[-1])
    data, run = prepared(validation_fraction=0.25, seed=3), tmp_path / "run"
    train(make_spec(tiny_base(), data, run, lora=None, training__max_steps=5, training__learning_rate=0.05,
                    evaluation__every_steps=1))  # fmt: skip
    trained = learners[0].model.eval()
    with torch.no_grad():
        written = LlamaForCausalLM.from_pretrained(run / "model")(IDS).logits
        torch.testing.assert_close(trained(IDS), written, atol=1e-4, rtol=0)
        best = LlamaForCausalLM.from_pretrained(run / "best")
        rows = kept_rows(data, "validation")
        loss = summed_cross_entropy(best, collate(rows)).item()
    tokens = sum(label != -100 for _, labels in rows for label in labels)
    assert loss / tokens == pytest.approx(min(line["loss"] for line in metrics(run, "eval")), rel=1e-5)


def test_drawn_weights_are_a_function_of_the_seed(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """Only the configuration of the base is read: a directory without weights does."""
    base = tmp_path / "configuration"
    base.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (base / name).write_bytes((tiny_base() / name).read_bytes())
    for name, seed in (("one", 4), ("same", 4), ("other", 5)):
        torch.rand(3)
        spec = make_spec(base, prepared(), tmp_path / name, lora=None, model__init="random", training__seed=seed,
                         training__max_steps=2, data__shuffle=False)  # fmt: skip
        train(spec)
    assert files(tmp_path / "one" / "model") == files(tmp_path / "same" / "model")
    assert losses(tmp_path / "one") == losses(tmp_path / "same")
    assert losses(tmp_path / "one")[0] != losses(tmp_path / "other")[0]
    weights = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert weights["lm_head.weight"].shape == (131, 48)
    assert abs(losses(tmp_path / "one")[0] - torch.tensor(131.0).log().item()) < 0.1  # knows nothing


def test_a_cut_model_trains_an_adapter_of_its_own_layers(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import LlamaForCausalLM

    run = tmp_path / "run"
    train(make_spec(tiny_base(), prepared(), run, model__num_layers=2, training__max_steps=3,
                    lora={"r": 4, "alpha": 8, "dropout": 0.0}, data__shuffle=False))  # fmt: skip
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in adapter_tensors(run / "adapter")}
    assert layers == {0, 1}
    cut = LlamaForCausalLM.from_pretrained(tiny_base())
    cut.model.layers = cut.model.layers[:2]
    cut.config.num_hidden_layers = 2
    adapted = PeftModel.from_pretrained(cut, run / "adapter")
    rows = kept_rows(prepared())[:6]
    with torch.no_grad():
        with adapted.disable_adapter():
            before = summed_cross_entropy(adapted, collate(rows)).item()
        after = summed_cross_entropy(adapted, collate(rows)).item()
    tokens = sum(label != -100 for _, labels in rows for label in labels)
    assert before / tokens == pytest.approx(losses(run)[0], abs=1e-5)
    assert after < before
    assert isinstance(adapted.peft_config["default"], LoraConfig)


def test_training_on_from_an_adapter_starts_with_its_loss(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    plain = {"data__shuffle": False, "training__max_steps": 1, "training__gradient_accumulation_steps": 8}
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    first, second = tmp_path / "first", tmp_path / "second"
    train(make_spec(tiny_base(), prepared(), first, lora=lora, **{**plain, "training__max_steps": 5}))
    train(make_spec(tiny_base(), prepared(), second, lora={**lora, "init_from": str(first / "adapter")}, **plain))
    assert losses(second)[0] < losses(first)[-1] < losses(first)[0]
    train(make_spec(tiny_base(), prepared(), tmp_path / "sixth", lora=lora, **{**plain, "training__max_steps": 6}))
    assert losses(second)[0] == pytest.approx(losses(tmp_path / "sixth")[5], abs=1e-6)

"""SmolLM2-135M-Instruct, a real chat-tuned model, against every judge: `make test-interop` fetches it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from asking import Answer, Question, ask, to_gguf
from computing import CHATS, Computed, compute, without_end, worst_difference
from environments import CACHE
from hard_texts import HARD_TEXTS, random_texts
from reference_run import kept_rows, reference_run
from run_tools import adapter_tensors, losses, make_spec
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.conversion import ConvertOptions
from llamatune.command_options.inference import MergeOptions
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.training.train import train

pytestmark = pytest.mark.interop
MODEL = CACHE / "smollm2-135m-instruct"
TEXTS = HARD_TEXTS + random_texts(500, 4)
PROMPTS = [
    "The capital of France is",
    "def factorial(n):\n    ",
    "Seven apples and three pears are",
    "Once upon a time,",
]
JUDGES = ["transformers5", "transformers4", "mlx", "llama.cpp"]
OF_BASE = ["transformers5", "llama.cpp"]
"""The others misread what transformers 5 wrote: theta, and the tokenizer's class; llama.cpp reads a file of convert."""
TOLERANCE = {"transformers5": 1e-4, "transformers4": 1e-4, "mlx": 1e-3, "llama.cpp": 1e-3}
"""Of logits that range over 47 in fp32: the last two add in another order."""


@pytest.fixture(scope="module")
def model() -> Path:
    if not MODEL.is_dir():
        pytest.skip(f"no {MODEL.name} in {CACHE}: run `make test-interop` where it can be fetched")
    return MODEL


@pytest.fixture(scope="module")
def ids(model: Path) -> list[list[int]]:
    """Of plain prompts and of chats."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in CHATS[:2]]
    return [*tokenizer(PROMPTS)["input_ids"], *chats]


@pytest.fixture(scope="module")
def adapter(model: Path, peft_adapter: Callable[..., Path]) -> Path:
    return peft_adapter(model, r=4, scale=0.02)


@pytest.fixture(scope="module")
def merged(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "merged"
    merge_lora(MergeOptions(model, adapter, output, force_base=True))
    return output


@pytest.fixture(scope="module")
def computed(model: Path, merged: Path, ids: list[list[int]]) -> dict[str, Computed]:
    return {"base": compute(model, ids=ids), "merged": compute(merged, ids=ids)}


@pytest.fixture(scope="module")
def answers(
    model: Path, merged: Path, ids: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Answer]]:
    known: dict[str, dict[str, Answer]] = {}

    def of(judge: str) -> dict[str, Answer]:
        if judge not in known:
            paths = {"base": model, "merged": merged} if judge in OF_BASE else {"merged": merged}
            if judge == "llama.cpp":
                folder = tmp_path_factory.mktemp("gguf")
                paths = {name: folder / f"{name}.gguf" for name in paths}
                convert(ConvertOptions(model, paths["base"], dtype="float32"))
                to_gguf({merged: paths["merged"]})
            known[judge] = ask(judge, {n: Question(path, None, ids, TEXTS, CHATS) for n, path in paths.items()})
        return known[judge]

    return of


@pytest.mark.parametrize(
    ("judge", "which"), [(judge, "merged") for judge in JUDGES] + [(judge, "base") for judge in OF_BASE]
)
def test_another_program_computes_the_same(judge, which, answers, computed, note):
    answer, ours = answers(judge)[which], computed[which]
    assert answer["theta"] == ours.theta == 100_000
    worst = worst_difference(answer, ours)
    note(f"{judge} {answer['release']}: SmolLM2, {which}", worst)
    assert worst < TOLERANCE[judge]
    assert [without_end(row, ours) for row in answer["greedy"]] == ours.greedy


@pytest.mark.parametrize("judge", JUDGES)
def test_another_program_reads_texts_and_chats_the_same(judge, answers, model, merged):
    tokenizer, base = load_tokenizer(merged), AutoTokenizer.from_pretrained(model)
    # llama.cpp's converter takes the tokenizer for the published one, which splits " ½" otherwise.
    answer = answers(judge)["base" if judge == "llama.cpp" else "merged"]
    assert [text for text, theirs in zip(TEXTS, answer["texts"], strict=True) if tokenizer.encode(text) != theirs] == []
    assert answer["chats"] == [
        base.apply_chat_template(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] != "assistant")
        for chat in CHATS
    ]


def test_two_steps_of_training_are_those_of_peft(model, adapter, prepared, tmp_path):
    from peft import PeftModel

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": f" {p[::-1]}"}) + "\n" for p in PROMPTS * 2))
    data = prepared(rows, model, skip_bad_rows=0)
    spec = make_spec(
        model, data, tmp_path / "run",
        lora={"r": 4, "alpha": 7, "dropout": 0.0, "target_modules": "all-linear", "init_from": str(adapter)},
        data__shuffle=False, training__max_steps=2, training__optimizer="sgd", training__learning_rate=0.05,
        training__lr_scheduler="constant", training__warmup_steps=0, training__micro_batch_size=2,
        training__gradient_accumulation_steps=2, training__max_grad_norm=1.0,
    )  # fmt: skip
    train(spec)
    judge = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter, is_trainable=True
    )
    reference = reference_run(
        judge, kept_rows(data), lambda p: torch.optim.SGD(p, lr=1), lambda step: 0.05, 2, 1.0, micro_batch_size=2,
        accumulation=2,
    )  # fmt: skip
    assert losses(tmp_path / "run") == pytest.approx(reference.losses, abs=1e-4)
    trained = adapter_tensors(tmp_path / "run" / "adapter")
    expected = {name.replace(".default.", "."): tensor for name, tensor in reference.trained.items()}
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            trained[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_weights_survive_both_formats(model, adapter, tmp_path):
    """With an adapter that changes nothing, through Meta's format and back: the same bytes of every tensor."""
    idle = tmp_path / "idle"
    idle.mkdir()
    (idle / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: x * ("lora_A" in name) for name, x in weights.items()}, idle / "adapter_model.safetensors")
    source = model
    for number, format_ in enumerate(("meta", "hf")):
        if number:  # the same adapter is merged into a model once
            weights = {name: x * 2 for name, x in load_file(idle / "adapter_model.safetensors").items()}
            save_file(weights, idle / "adapter_model.safetensors")
        merge_lora(MergeOptions(source, idle, tmp_path / format_, format_, force_base=True))
        source = tmp_path / format_
    before, after = load_file(model / "model.safetensors"), load_file(source / "model.safetensors")
    assert before.keys() == after.keys() - ({"lm_head.weight"} - before.keys())
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)

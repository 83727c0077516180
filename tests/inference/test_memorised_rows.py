"""Rows learned by heart are answered word for word: what ``generate`` encodes is what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.batches import open_prepared
from llamatune.data.prepare import prepare_data
from llamatune.data.template_choice import stored_template
from llamatune.inference.engine import complete
from llamatune.inference.prompt_encoding import PromptEncoder, shown_answer
from llamatune.model.loss import summed_loss
from llamatune.tokenizers.loading import load_tokenizer

SAID = {
    "what is red": "a llama", "and blue": "nine apples", "what falls": "Cold rain", "over what": "- green hills",
    "count 7 ": "  seven", "who walks": "The llama\nwalks",
}  # fmt: skip
FIELDS = {"gsm8k": ("question", "answer"), "completion": ("prompt", "completion")}
OWN = {
    "space": 'prompt: "Question: {instruction} Answer: "\n',
    "lines": 'prompt: "Question: {instruction}\\nAnswer:\\n\\n"\n',
}
CASES = [
    ("sentencepiece", "alpaca"), ("sentencepiece", "gsm8k"), ("sentencepiece", "completion"),
    ("sentencepiece", "space"), ("sentencepiece", "llama2-chat"), ("sentencepiece", "chatml"),
    ("bytes", "llama3-chat"), ("bytes", "space"), ("bytes", "lines"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(
    tiny_base: Callable[..., Path],
    tokenizer_models: dict[str, Path],
    chat_tokenizers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Random models with a tokenizer of either kind, each with the special tokens of a chat template."""
    size = {"vocab_size": 520, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    small = tiny_base(intermediate_size=64, **size)
    made = {kind: tmp_path_factory.mktemp("bases") / kind for kind in ("sentencepiece", "bytes")}
    for directory in made.values():
        shutil.copytree(small, directory, ignore=shutil.ignore_patterns("*token*", "generation*"))
    byte_level = load_tokenizer(chat_tokenizers["llama3"])
    config = json.loads((small / "config.json").read_text())
    ends = {"bos_token_id": byte_level.bos_id, "eos_token_id": byte_level.eos_id}
    (made["bytes"] / "config.json").write_text(json.dumps({**config, **ends}))
    shutil.copy(tokenizer_models["bpe"], made["sentencepiece"] / "tokenizer.model")
    (made["sentencepiece"] / "added_tokens.json").write_text('{"<|im_start|>": 512, "<|im_end|>": 513}')
    for file in chat_tokenizers["llama3"].iterdir():
        shutil.copy(file, made["bytes"])
    return made


def prepared(base: Path, template: str, directory: Path) -> Path:
    """The rows in a template, one of ``OWN`` or a built-in one."""
    asked, answered = FIELDS.get(template, ("instruction", "output"))
    rows = [json.dumps({asked: prompt, answered: answer}) + "\n" for prompt, answer in SAID.items()]
    (directory / "rows.jsonl").write_text("".join(rows))
    if template in OWN:
        (directory / f"{template}.yaml").write_text(OWN[template])
        template = str(directory / f"{template}.yaml")
    report = prepare_data(PrepareOptions([directory / "rows.jsonl"], base, directory / "data", template=template))
    assert (report["kept"], report["prompts_not_prefix"]) == (6, 0)
    return directory / "data"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_six_rows_are_answered_as_they_were_trained(
    bases: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    data = open_prepared(prepared(bases[kind], name, tmp_path))
    model, batch = load_model(bases[kind], dtype=torch.float32), data.train.batch(range(6))
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(45):
        optimizer.zero_grad()
        loss = summed_loss(model, batch.input_ids, batch.labels, batch.lengths) / batch.target_tokens
        loss.backward()
        optimizer.step()
    tokenizer = load_tokenizer(bases[kind])
    assert data.manifest.template is not None
    encoder = PromptEncoder(tokenizer, stored_template(data.manifest.template))
    asked = [encoder.segments(prompt, 1) for prompt in SAID]
    ids = [segments.encode(tokenizer)[0] for segments in asked]
    made = complete(model.eval(), ids, Sampling(24, temperature=0), encoder.stop_ids(model.config))
    answers = [
        shown_answer(tokenizer, segments, prompt, one.ids)
        for segments, prompt, one in zip(asked, ids, made, strict=True)
    ]
    trims = name.endswith("-chat")  # these templates take white space off the ends of a message
    assert [answer.strip() if trims else answer for answer in answers] == [
        answer.strip() if trims else answer for answer in SAID.values()
    ]
    assert {one.finish_reason for one in made} == {"eos"}


def test_adapter_and_merged_model_carry_the_rule(
    command: Callable[..., Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter, merged = bases["sentencepiece"], tmp_path / "run" / "adapter", tmp_path / "merged"
    spec = {
        "model": {"path": str(base)},
        "data": {"train": str(prepared(base, "space", tmp_path))},
        "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear", "dropout": 0},
        "training": {
            "max_steps": 60, "micro_batch_size": 6, "gradient_accumulation_steps": 1, "learning_rate": 2e-2,
            "precision": "fp32", "output_dir": str(tmp_path / "run"),
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    assert command("train", tmp_path / "run.yaml").code == 0
    assert command("merge-lora", "--model", base, "--adapter", adapter, "--output", merged).code == 0
    asked = [word for prompt in SAID for word in ("--prompt", prompt)]
    for words in (("--model", base, "--adapter", adapter), ("--model", merged)):
        outcome = command("generate", *words, *asked, "--temperature", 0, "--max-new-tokens", 24, "--json")
        assert outcome.code == 0, outcome.stderr
        results = json.loads(outcome.stdout)["results"]
        assert [result["completion"] for result in results] == [*SAID.values()]
        assert results[0]["prompt"] == "Question: what is red Answer: "
    for directory in (adapter, merged):
        template = json.loads((directory / "llamatune.json").read_text())["facts"]["template"]
        assert template["boundary"] == "prompt"

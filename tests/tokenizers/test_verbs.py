"""Every verb with the tokenizers of a ``tokenizer.json``, of Meta's Llama 3, and of a model with added tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trained_tokenizers import tiktoken_file
from transformers import AutoTokenizer

from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer
from llamatune.tokenizers.loading import load_tokenizer

Command = Callable[..., Any]


def _prepared(command: Command, rows: Path, tokenizer: Path, output: Path, *more: object) -> dict[str, Any]:
    words = ("prepare-data", rows, "--tokenizer", tokenizer, "--output", output, "--skip-bad-rows", 2, *more, "--json")
    outcome = command(*words)
    assert outcome.code == 0, outcome.stderr
    return dict(json.loads(outcome.stdout))


def _trained(command: Command, model: Path, data: Path, directory: Path) -> Path:
    spec = {
        "model": {"path": str(model)},
        "data": {"train": str(data)},
        "lora": {"r": 2},
        "training": {"max_steps": 2, "output_dir": str(directory / "run")},
    }
    (directory / "run.yaml").write_text(json.dumps(spec))
    outcome = command("train", directory / "run.yaml")
    assert outcome.code == 0, outcome.stderr
    return next(path.parent for path in sorted((directory / "run").rglob("adapter_config.json")))


@pytest.mark.parametrize("kind", ["llama_3", "smollm", "llama_2"])
def test_from_rows_to_a_merged_model(
    command: Command,
    tiny_base: Callable[..., Path],
    tiny_rows: Path,
    json_tokenizers: dict[str, Path],
    tmp_path: Path,
    kind: str,
) -> None:
    tokenizer = load_tokenizer(json_tokenizers[kind])
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_base(vocab_size=700, **ids), model)
    (model / "tokenizer.model").unlink()
    shutil.copytree(json_tokenizers[kind], model, dirs_exist_ok=True)
    report = _prepared(command, tiny_rows, model, data, "--preview", 1)
    tokens = report["preview"][0]["tokens"]
    judge = AutoTokenizer.from_pretrained(model)
    row = json.loads(tiny_rows.read_text().splitlines()[0])
    texts = row["prompt"], row["prompt"] + row["completion"]
    prompt, whole = (judge.encode(text, split_special_tokens=True) for text in texts)
    found = [token["id"] for token in tokens]
    first = next(number for number, token in enumerate(tokens) if token["trained"])
    assert (found[:first], found[-1]) == (prompt, judge.eos_token_id)
    assert judge.decode(found[:-1]) == judge.decode(whole)
    assert judge.decode(found[first:-1]).endswith(row["completion"].strip())
    manifest = json.loads((data / "llamatune.json").read_text())
    assert manifest["facts"]["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    adapter = _trained(command, model, data, tmp_path)
    outcome = command("merge-lora", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")
    assert outcome.code == 0, outcome.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (model / name).read_bytes()
    prompts = ("generate", "--prompt", "a red llama 🦙", "--max-new-tokens", 4, "--json")
    outcomes = [
        command(*prompts, "--model", model, "--adapter", adapter),
        command(*prompts, "--model", tmp_path / "merged"),
    ]
    results = [json.loads(outcome.stdout)["results"][0] for outcome in outcomes]
    assert results[0]["completion_ids"] == results[1]["completion_ids"]
    assert results[0]["completion"] == tokenizer.continuation(
        tokenizer.encode("a red llama 🦙"), results[0]["completion_ids"]
    )


def test_a_tokenizer_without_bos_trains_no_first_token_and_needs_a_prompt(
    command: Command, tiny_base: Callable[..., Path], json_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a red llama"}\n{"text": "green hills and rain"}\n')
    tokenizer = load_tokenizer(json_tokenizers["smollm"])
    report = _prepared(command, rows, json_tokenizers["smollm"], tmp_path / "data", "--train-on-prompt")
    split = load_file(tmp_path / "data" / "train.safetensors")
    starts = split["offsets"].tolist()
    assert split["input_ids"].tolist()[: starts[1]] == [*tokenizer.encode("a red llama"), tokenizer.eos_id]
    assert [split["loss_mask"][start].item() for start in starts[:-1]] == [0, 0]
    assert report["splits"]["train"]["target_tokens"] == len(split["input_ids"]) - 2
    model = tmp_path / "model"
    shutil.copytree(tiny_base(vocab_size=700, eos_token_id=tokenizer.eos_id), model)
    (model / "tokenizer.model").unlink()
    shutil.copytree(json_tokenizers["smollm"], model, dirs_exist_ok=True)
    outcome = command("generate", "--model", model, "--prompt", "")
    assert outcome.code == 3
    assert "prompt 1 has no token, and this tokenizer puts no BOS before it" in outcome.stderr


def test_metas_llama_3_is_merged_to_both_formats(
    command: Command,
    tiny_base: Callable[..., Path],
    meta_copy: Callable[..., Path],
    tiny_rows: Path,
    json_tokenizers: dict[str, Path],
    tmp_path: Path,
) -> None:
    content = tiktoken_file(json_tokenizers["llama_3"])
    rows = content.count(b"\n") + 256
    meta = meta_copy(tiny_base(vocab_size=rows))
    (meta / "tokenizer.model").write_bytes(content)
    tokenizer = load_tokenizer(meta)
    _prepared(command, tiny_rows, meta, tmp_path / "data")
    adapter = _trained(command, meta, tmp_path / "data", tmp_path)
    for name in ("hf", "meta"):
        outcome = command(
            "merge-lora", "--model", meta, "--adapter", adapter, "--output", tmp_path / name, "--format", name
        )
        assert outcome.code == 0, outcome.stderr
        assert "no tokenizer" not in outcome.stderr
        assert load_tokenizer(tmp_path / name).encode(" a red🦙") == tokenizer.encode(" a red🦙")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(" a red🦙") == tokenizer.encode(" a red🦙")


def test_what_transformers_5_wrote_is_written_for_transformers_4_too(
    json_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    judge = AutoTokenizer.from_pretrained(json_tokenizers["llama_3"])
    judge.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    judge.save_pretrained(source)
    written = json.loads((source / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "TokenizersBackend", "of interest only as long as transformers 5 writes this"
    assert written["extra_special_tokens"] == ["<|extra|>"]
    copy.mkdir()
    copy_huggingface_tokenizer(source, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|extra|>"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(copy)
    assert again.encode("a<|extra|> b") == judge.encode("a<|extra|> b")
    assert again.eos_token_id == judge.eos_token_id


def test_a_chatml_model_of_sentencepiece(
    command: Command, tiny_base: Callable[..., Path], tiny_rows: Path, tmp_path: Path
) -> None:
    """Rows end in the model's EOS, an added token, and user text spells no special token."""
    model = tmp_path / "model"
    shutil.copytree(tiny_base(eos_token_id=101), model)
    (model / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 100, "<|im_end|>": 101}))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    report = _prepared(command, tiny_rows, model, tmp_path / "data", "--preview", 1)
    ids = [token["id"] for token in report["preview"][0]["tokens"]]
    assert ids[-1] == 101
    assert max(ids[:-1]) < 100
    adapter = _trained(command, model, tmp_path / "data", tmp_path)
    outcome = command("merge-lora", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")
    assert outcome.code == 0, outcome.stderr
    assert load_tokenizer(tmp_path / "merged").fingerprint == load_tokenizer(model).fingerprint
    assert (
        command("generate", "--model", tmp_path / "merged", "--prompt", "<|im_end|>", "--max-new-tokens", 2).code == 0
    )

"""What adapters and models carry beside their tensors: tokenizer, chat template, EOS, licences, card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_tools import make_spec

from llamatune.checkpoints import companion_files
from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.template_choice import stored_template
from llamatune.events import Notice, StepDone
from llamatune.formats.manifest import verify_product
from llamatune.spec import RunSpec
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.training.train import train

LICENCES = {"LICENSE": "may be used", "NOTICE.txt": "was made by", "USE_POLICY.md": "not for harm"}
CARRIED = ("README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% if m['role'] == 'assistant' %}"
    "<|end_of_text|>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Turns end in another token than the tokenizer's EOS."""
CHAT = [
    {"role": "system", "content": " count apples "}, {"role": "user", "content": " a red llama\n"},
    {"role": "assistant", "content": "walks over 'green' hills "}, {"role": "user", "content": "cold \\rain"},
]  # fmt: skip


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path], json_tokenizers: dict[str, Path]
) -> Path:
    """A model with a Llama 3's tokenizer, two EOS and licence files."""
    path, tokenizer = tmp_path_factory.mktemp("carried") / "base", load_tokenizer(json_tokenizers["llama_3"])
    eos = {"bos_token_id": tokenizer.bos_id, "eos_token_id": [tokenizer.eos_id, 5]}
    shutil.copytree(tiny_base(vocab_size=700, **eos), path)
    (path / "tokenizer.model").unlink()
    shutil.copytree(json_tokenizers["llama_3"], path, dirs_exist_ok=True)
    facts = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": TEMPLATE}))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, **eos}))
    for name, text in LICENCES.items():
        (path / name).write_text(text)
    return path


def spec_for(base: Path, prepared: Callable[..., Path], output: Path, chat: bool = True, **changes: Any) -> RunSpec:
    rows = output.parent / "rows.jsonl"
    made = []
    for number in range(12):
        turns = [f"a red llama {number}", "walks over hills", "nine apples", "fall on old stones"]
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
        made.append({"messages": messages} if chat else {"text": " ".join(turns)})
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    data = prepared(rows, base / ("tokenizer.json" if (base / "tokenizer.json").exists() else "tokenizer.model"),
                    validation_fraction=0.4, max_seq_length=200)  # fmt: skip
    return make_spec(base, data, output, training__max_steps=3, evaluation__every_steps=1, **changes)


@pytest.fixture(scope="module")
def run(base: Path, prepared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("carried") / "run"
    train(spec_for(base, prepared, output))
    return output


@pytest.mark.parametrize("product", ["adapter", "best"])
def test_an_adapter_carries_what_its_readers_need(run: Path, base: Path, product: str) -> None:
    directory = run / product
    names = set(os.listdir(directory))
    assert names >= {*CARRIED, *LICENCES}
    assert all((directory / name).read_text() == text for name, text in LICENCES.items())
    assert (directory / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    of_base, stated = (json.loads((d / "generation_config.json").read_text()) for d in (base, directory))
    end_of_turn = load_tokenizer(base).special_ids["<|end_of_text|>"]
    assert end_of_turn not in of_base["eos_token_id"]
    assert stated == {**of_base, "eos_token_id": [*of_base["eos_token_id"], end_of_turn]}
    assert set(verify_product(directory).files) == names - {"llamatune.json"}
    assert json.loads((directory / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert not {*CARRIED, *LICENCES} & set(os.listdir(next((run / "checkpoints").glob("step-*"))))


def test_the_card_says_what_was_done(run: Path, base: Path) -> None:
    header, body = (run / "adapter" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header) == {
        "base_model": str(base), "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["llamatune", "lora"],
    }  # fmt: skip
    for words in ("| rows | 7 training rows", "| training loss | ", "learning_rate: 0.01", "AutoPeftModelForCausalLM"):
        assert words in body
    assert str(run) not in body
    assert "the lowest of the run" in (run / "best" / "README.md").read_text()


def test_peft_and_transformers_open_it_and_apply_the_template(run: Path, base: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(run / "adapter")
    ours = load_tokenizer(base)
    template = stored_template(load_adapter(run / "adapter").template or {})
    assert isinstance(template, ChatTemplate)
    made = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert made == ChatEncoder(template, ours).prompt(CHAT).encode(ours)[0]
    assert theirs.apply_chat_template(CHAT, tokenize=False).endswith("<user>cold \\rain")
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert torch.isfinite(model(torch.tensor([made])).logits).all()


def refuse_to_link(source: Path, target: Path) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_what_best_carries_is_made_once(
    base: Path, prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And made anew where files cannot have two names."""
    copied: list[Path] = []
    copy = companion_files.copy_huggingface_tokenizer
    monkeypatch.setattr(companion_files, "copy_huggingface_tokenizer", lambda *a: copied.append(a[1]) or copy(*a))
    spec = spec_for(base, prepared, tmp_path / "run", training__learning_rate=1e-3)
    train(spec)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().split('"best": true')) > 2
    assert len(copied) == 2  # best/ and adapter/
    assert {path.stat().st_nlink for path in (tmp_path / "run").rglob("*") if path.is_file()} == {1}
    monkeypatch.setattr("llamatune.durable_writing.os.link", refuse_to_link)
    copied.clear()
    other = spec_for(base, prepared, tmp_path / "other", training__learning_rate=1e-3)
    train(other)
    assert len(copied) > 2
    for product in ("best", "adapter"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "run" / product).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "other" / product).iterdir()} == files


def test_the_base_of_a_meta_directory_is_not_named_to_peft(
    base: Path, prepared: Callable[..., Path], meta_copy: Callable[..., Path], tiny_base: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Its SentencePiece model is carried as transformers reads it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meta = meta_copy(tiny_base())
    train(spec_for(meta, prepared, tmp_path / "run"))
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert load_adapter(adapter).base_path == str(meta)
    assert "`llamatune merge-lora --format hf`" in (adapter / "README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base()), adapter)
    ids = AutoTokenizer.from_pretrained(adapter).apply_chat_template(CHAT, return_dict=False)
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    assert ids[0] == 1
    merge_lora(MergeOptions(meta, adapter, tmp_path / "merged", format="hf"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(CHAT, return_dict=False) == ids


def test_a_merge_carries_the_chat_template_of_the_adapter(run: Path, base: Path, tmp_path: Path) -> None:
    merge_lora(MergeOptions(base, run / "adapter", tmp_path / "merged"))
    merged = tmp_path / "merged"
    assert set(os.listdir(merged)) >= {*CARRIED, *LICENCES, "config.json"}
    template = (run / "adapter" / "chat_template.jinja").read_text()
    assert (merged / "chat_template.jinja").read_text() == template
    assert json.loads((merged / "tokenizer_config.json").read_text())["chat_template"] == template
    header = yaml.safe_load((merged / "README.md").read_text().split("---\n")[1])
    assert (header["base_model"], header["library_name"]) == (str(base), "transformers")
    assert set(verify_product(merged).files) == set(os.listdir(merged)) - {"llamatune.json"}
    merge_lora(MergeOptions(base, run / "adapter", tmp_path / "meta", format="meta"))
    assert set(os.listdir(tmp_path / "meta")) >= {"README.md", *LICENCES}


@pytest.mark.parametrize("home", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_bases_own_template_is_written_to_both_homes(
    base: Path, prepared: Callable[..., Path], tmp_path: Path, home: str
) -> None:
    """Where the rows were no conversations. Named templates are carried too."""
    own, template = tmp_path / "base", "{{ messages[0]['content'] }}"
    shutil.copytree(base, own)
    facts = json.loads((own / "tokenizer_config.json").read_text())
    if home == "chat_template.jinja":
        (own / home).write_text(template)
    else:
        (own / home).write_text(json.dumps({**facts, "chat_template": [{"name": "default", "template": template}]}))
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "tools.jinja").write_text("tools")
    train(spec_for(own, prepared, tmp_path / "run", chat=False))
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == template
    stated = json.loads((adapter / "tokenizer_config.json").read_text())["chat_template"]
    assert template in (stated, stated[0]["template"] if isinstance(stated, list) else None)
    assert (adapter / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


@pytest.mark.parametrize(
    ("gone", "whole"), [(False, False), (True, False), (True, True)], ids=["broken", "gone", "gone, model"]
)
def test_a_base_that_is_no_longer_in_order_costs_a_notice(
    base: Path, prepared: Callable[..., Path], tmp_path: Path, gone: bool, whole: bool
) -> None:
    """The weights were read before; the run ends with all that it trained."""
    own, told = tmp_path / "base", list[Any]()
    shutil.copytree(base, own)
    changes = {"lora": None} if whole else {}
    spec = spec_for(own, prepared, tmp_path / "run", model__memory_map=False, **changes)

    def harm(event: Any) -> None:
        told.append(event)
        if isinstance(event, StepDone) and event.step == 1:
            (own / "tokenizer_config.json").write_text("{")
            if gone:
                shutil.rmtree(own)

    train(spec, on_event=harm)
    words = [event.message for event in told if isinstance(event, Notice)]
    told_of = "no tokenizer in it, so none is written" if gone else "written without what the base should give"
    assert whole or any(told_of in message for message in words)
    product = tmp_path / "run" / ("model" if whole else "adapter")
    assert "README.md" in verify_product(product).files
    assert whole or not {"tokenizer.json", "LICENSE"} & set(os.listdir(product))


def test_a_model_of_full_fine_tuning_carries_them_too(
    base: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    train(spec_for(base, prepared, tmp_path / "run", lora=None))
    model = tmp_path / "run" / "model"
    assert set(os.listdir(model)) >= {*CARRIED, *LICENCES}
    assert yaml.safe_load((model / "README.md").read_text().split("---\n")[1])["library_name"] == "transformers"

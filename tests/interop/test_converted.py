"""What ``convert`` and ``convert-adapter`` write, opened by llama.cpp and mlx-lm: the same logits, the same tokens."""

from __future__ import annotations

import json
import shutil
import unicodedata

import pytest
import torch
from hard_texts import HARD_TEXTS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llamatune.checkpoints.adapter_formats import convert_adapter
from llamatune.checkpoints.converting import convert
from llamatune.command_options.conversion import ConvertAdapterOptions, ConvertOptions
from llamatune.tokenizers.loading import load_tokenizer

asking = pytest.importorskip("asking", reason="the judges of test-interop")
pytestmark = pytest.mark.interop

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILY = {
    "llama": ("bpe", {}),
    "tied": ("bpe", {"tie_word_embeddings": True}),
    "llama 3": ("llama-bpe", {"rope_parameters": LLAMA_3, "max_position_embeddings": 131072}),
    "mistral": ("bpe", {"model_type": "mistral", "sliding_window": None}),
    "linear": ("bpe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": ("bpe", {"rope_parameters": YARN}),
    "yarn, own factors": ("bpe", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "biases": ("smollm", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "rope_theta": 1e6}),
    "qwen3": ("qwen2", {"model_type": "qwen3", "head_dim": 24}),
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(7)).tolist()
ROUNDING = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5, "q8_0": 0.5}
"""Of logits up to about 10."""


@pytest.fixture(scope="module")
def bases(tiny_base, tokenizer_models, kinds_of_json, tmp_path_factory):
    """A model of each member with a tokenizer that llama.cpp knows."""
    made = {}
    for member, (kind, changes) in FAMILY.items():
        path = made[member] = tmp_path_factory.mktemp("base") / member
        model = tiny_base(vocab_size=700, **WIDE, **changes)
        shutil.copytree(model, path, ignore=shutil.ignore_patterns("tokenizer*", "generation_config.json"))
        if kind == "bpe":
            shutil.copy(tokenizer_models["bpe"], path / "tokenizer.model")
            continue
        for file in kinds_of_json(kind).iterdir():
            shutil.copy(file, path)
        ends = {"bos_token_id": None, "eos_token_id": load_tokenizer(kinds_of_json(kind)).eos_id}
        facts = json.loads((path / "config.json").read_text()) | ends
        (path / "config.json").write_text(json.dumps(facts))
    return made


def logits_of(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def opened(bases, tmp_path_factory):
    folder, questions = tmp_path_factory.mktemp("gguf"), {}
    for member, base in bases.items():
        for dtype in ROUNDING if member in ("llama", "qwen2") else ("float32",):
            path = folder / f"{member} {dtype}.gguf"
            convert(ConvertOptions(base, path, dtype=dtype))
            questions[f"{member} {dtype}"] = asking.Question(path, ids=[IDS], texts=HARD_TEXTS)
    return asking.ask("llama.cpp", questions)


@pytest.mark.parametrize("member", FAMILY)
def test_llama_cpp_computes_the_same_logits(opened, bases, member):
    for dtype, tolerance in ROUNDING.items():
        if f"{member} {dtype}" in opened:
            got = torch.from_numpy(opened[f"{member} {dtype}"].logits[0])
            torch.testing.assert_close(got, logits_of(bases[member]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("member", FAMILY)
def test_llama_cpp_splits_texts_into_the_same_tokens(opened, bases, member):
    """But for Qwen's texts that are not in normal form C, which llama.cpp does not make of them."""
    tokenizer, composes = load_tokenizer(bases[member]), FAMILY[member][0] == "qwen2"
    for text, ids in zip(HARD_TEXTS, opened[f"{member} float32"]["texts"], strict=True):
        if not composes or unicodedata.is_normalized("NFC", text):
            assert ids == tokenizer.encode(text), text


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """An adapter of PEFT's with several ranks and alphas on two architectures."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for member in ("llama", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(bases[member], dtype=torch.float32)
        config = LoraConfig(
            r=4, lora_alpha=7, target_modules=["q_proj", "k_proj", "up_proj", "o_proj"], rank_pattern={"k_proj": 2},
            alpha_pattern={"up_proj": 3}, use_rslora=member == "qwen3", task_type="CAUSAL_LM",
        )  # fmt: skip
        adapted = get_peft_model(model, config)
        torch.manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        adapted.save_pretrained(folder / member)
        made[member] = folder / member
    return made


@pytest.mark.parametrize(("judge", "format_"), [("llama.cpp", "gguf"), ("mlx", "mlx")])
def test_a_converted_adapter_computes_the_same_logits(bases, adapters, tmp_path, judge, format_):
    questions = {}
    for member, adapter in adapters.items():
        base = bases[member]
        if format_ == "gguf":
            convert(ConvertOptions(base, tmp_path / f"{member}.gguf"))
            base = tmp_path / f"{member}.gguf"
        output = tmp_path / f"{member}-adapter{'.gguf' if format_ == 'gguf' else ''}"
        convert_adapter(ConvertAdapterOptions(adapter, output, format_, bases[member]))
        questions[member] = asking.Question(base, output, ids=[IDS])
    for member, answer in asking.ask(judge, questions).items():
        assert answer.fault is None, answer.fault
        wanted, plain = logits_of(bases[member], adapters[member]), logits_of(bases[member])
        torch.testing.assert_close(torch.from_numpy(answer.logits[0]), wanted, atol=1e-4, rtol=0)
        assert (wanted - plain).abs().max() > 0.5

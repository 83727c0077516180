"""Base models of the family as several programs spell them, each with its tokenizer and a chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from asking import SCRIPTS, run
from environments import is_made
from trained_tokenizers import tiktoken_file

LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LLAMA_2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3_TEMPLATE = """{{ bos_token }}{%- for m in messages %}
    {{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
MEMBERS = {
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
}  # fmt: skip
BARE = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}  # fmt: skip
"""Without a tokenizer: transformers 5 replaces parts of one that is not Qwen's own."""

OUTPUTS = [
    "llama-2", "llama-2 of transformers 4", "llama-2 of Meta", "llama-3", "llama-3 of transformers 4",
    "llama-3 of Meta", "smollm", "smollm of transformers 4", "linear", "yarn", "mistral", "dynamic", "qwen2", "qwen3",
]  # fmt: skip
"""What is merged and opened by every judge."""


def make_bases(
    tiny_base: Callable[..., Path],
    meta_copy: Callable[..., Path],
    sentencepiece: Path,
    definitions: dict[str, Path],
    scratch: Path,
) -> dict[str, Path]:
    """By name. A base "of transformers 4" is written again by that release, where its environment is made."""

    def llama_2(name: str, **changes: object) -> Path:
        path = scratch / name
        shutil.copytree(tiny_base(vocab_size=520, **changes), path)
        shutil.copy(sentencepiece, path / "tokenizer.model")
        facts = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                 "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
                 "chat_template": LLAMA_2_TEMPLATE}  # fmt: skip
        (path / "tokenizer_config.json").write_text(json.dumps(facts))
        return path

    def with_definition(name: str, kind: str, template: str, **changes: object) -> Path:
        path = scratch / name
        shutil.copytree(tiny_base(vocab_size=520, **changes), path)
        (path / "tokenizer.model").unlink()
        shutil.copytree(definitions[kind], path, dirs_exist_ok=True)
        (path / "chat_template.jinja").write_text(template)
        return path

    def without_tokenizer(name: str, **changes: object) -> Path:
        shutil.copytree(tiny_base(**changes), scratch / name)
        (scratch / name / "tokenizer.model").unlink()
        return scratch / name

    plain = llama_2("plain")
    bases = {
        "llama-2": llama_2("llama-2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "llama-3": with_definition(
            "llama-3", "llama_3", LLAMA_3_TEMPLATE, bos_token_id=500, eos_token_id=[501, 502],
            rope_parameters={**LLAMA_3_ROPE, "original_max_position_embeddings": 16},
        ),
        "llama-3 without tokenizer": without_tokenizer(
            "llama-3 without tokenizer", vocab_size=tiktoken_file(definitions["llama_3"]).count(b"\n") + 256,
            rope_parameters={**LLAMA_3_ROPE, "original_max_position_embeddings": 8192},
            bos_token_id=497, eos_token_id=498,
        ),
        "smollm": with_definition(
            "smollm", "smollm", LLAMA_3_TEMPLATE, tie_word_embeddings=True, eos_token_id=2, dtype=torch.bfloat16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        ),
        "plain": plain,
        "llama-2 of Meta": meta_copy(plain),
        **{name: llama_2(name, **changes) for name, changes in MEMBERS.items()},
        **{name: without_tokenizer(name, **changes) for name, changes in BARE.items()},
    }  # fmt: skip
    if is_made("transformers4"):
        for name in ("llama-2", "llama-3", "smollm"):
            bases[f"{name} of transformers 4"] = path = scratch / f"{name} of transformers 4"
            run("transformers4", SCRIPTS / "resave.py", spelled_for_4(bases[name], scratch / f"{name} for 4"), path)
    return bases


def spelled_for_4(base: Path, path: Path) -> Path:
    """A copy whose angles transformers 4 reads right: of ``rope_parameters`` it knows nothing."""
    shutil.copytree(base, path)
    facts = json.loads((path / "config.json").read_text())
    rope = facts.pop("rope_parameters")
    facts |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    (path / "config.json").write_text(json.dumps(facts))
    return path

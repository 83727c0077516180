"""Models of the family by name, as their publishers configure them. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from llamatune.errors import SpecError
from llamatune.shapes.llama_config import QKV_MODULES, LlamaConfig
from llamatune.shapes.rope_scaling import Llama3Scaling

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA_3_TOKENS: dict[str, Any] = {"bos_token_id": 128000, "eos_token_ids": (128001, 128009)}


def _model(vocabulary: int, *sizes: int, **more: Any) -> LlamaConfig:
    named: dict[str, Any] = dict(zip(_SIZES, sizes, strict=True))
    return LlamaConfig(**named, vocab_size=vocabulary, **more)


def _llama_3(*sizes: int, **more: Any) -> LlamaConfig:
    return _model(128256, *sizes, rope_theta=500000.0, max_position_embeddings=8192, **_LLAMA_3_TOKENS, **more)


def _llama_31(earlier: LlamaConfig, factor: float = 8.0) -> LlamaConfig:
    """The same with the long context of Llama 3.1."""
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    return dataclasses.replace(
        earlier, max_position_embeddings=131072, rope_scaling=scaling, eos_token_ids=(128001, 128008, 128009)
    )


def _code_llama(*sizes: int, vocabulary: int = 32016) -> LlamaConfig:
    return _model(vocabulary, *sizes, rope_theta=1e6, max_position_embeddings=16384)


def _mistral(vocabulary: int = 32000, **more: Any) -> LlamaConfig:
    return LlamaConfig(4096, 14336, 32, 32, 8, vocabulary, model_type="mistral", max_position_embeddings=32768, **more)


def _smollm2(*sizes: int, theta: float = 100000.0) -> LlamaConfig:
    return _model(49152, *sizes, rope_theta=theta, max_position_embeddings=8192, tie_word_embeddings=True)


def _qwen(model_type: str, vocabulary: int, *sizes: int, **more: Any) -> LlamaConfig:
    return _model(
        vocabulary, *sizes, rms_norm_eps=1e-6, rope_theta=1e6, bos_token_id=151643, eos_token_ids=(151645, 151643),
        model_type=model_type, biased_modules=QKV_MODULES if model_type == "qwen2" else (),
        head_norms=model_type == "qwen3", **more,
    )  # fmt: skip


_32K, _40K, _128K = ({"max_position_embeddings": tokens} for tokens in (32768, 40960, 131072))
_8B, _70B = (4096, 14336, 32, 32, 8), (8192, 28672, 80, 64, 8)

PRESETS: dict[str, LlamaConfig] = {
    "llama-2-7b": LlamaConfig(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": LlamaConfig(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _model(32000, *_70B),
    "code-llama-7b": _code_llama(4096, 11008, 32, 32, 32),
    "code-llama-13b": _code_llama(5120, 13824, 40, 40, 40),
    "code-llama-34b": _code_llama(8192, 22016, 48, 64, 8, vocabulary=32000),
    "tinyllama-1.1b": LlamaConfig(2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048),
    "llama-3-8b": _llama_3(*_8B),
    "llama-3-70b": _llama_3(*_70B),
    "llama-3.1-8b": _llama_31(_llama_3(*_8B)),
    "llama-3.1-70b": _llama_31(_llama_3(*_70B)),
    "llama-3.1-405b": _llama_31(_llama_3(16384, 53248, 126, 128, 8)),
    "llama-3.2-1b": _llama_31(_llama_3(2048, 8192, 16, 32, 8, tie_word_embeddings=True), factor=32.0),
    "llama-3.2-3b": _llama_31(_llama_3(3072, 8192, 28, 24, 8, tie_word_embeddings=True), factor=32.0),
    "llama-3.3-70b": _llama_31(_llama_3(*_70B)),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, theta=130000.0),
    "mistral-7b-v0.1": _mistral(sliding_window=4096),
    "mistral-7b-v0.2": _mistral(rope_theta=1e6),
    "mistral-7b-v0.3": _mistral(32768, rope_theta=1e6),
    "qwen2.5-0.5b": _qwen("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True, **_32K),
    "qwen2.5-1.5b": _qwen("qwen2", 151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True, **_128K),
    "qwen2.5-7b": _qwen("qwen2", 152064, 3584, 18944, 28, 28, 4, **_128K),
    "qwen3-0.6b": _qwen("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True, **_40K),
    "qwen3-8b": _qwen("qwen3", 151936, 4096, 12288, 36, 32, 8, head_dim=128, **_40K),
}


def preset(name: str) -> LlamaConfig:
    """A member of the family by name."""
    if name not in PRESETS:
        raise SpecError(f"unknown preset {name!r}", "--preset", f"there are {', '.join(PRESETS)}")
    return PRESETS[name]

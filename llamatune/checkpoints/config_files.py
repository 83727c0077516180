"""``config.json`` (Hugging Face) and ``params.json`` (Meta) as a ``LlamaConfig``. No torch.

What would compute something else than LLaMA is refused by name; what the weights know better (vocabulary of Meta's
``-1``, a tied head) is taken from their headers.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from pathlib import Path
from typing import Any, Literal

from llamatune.checkpoints.stored import Stored, has_weights, same_bytes, stored_huggingface, stored_meta
from llamatune.checkpoints.tokenizer_pieces import count_tokenizer_pieces
from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError
from llamatune.formats.manifest import Manifest, find_manifest
from llamatune.shapes.config import LlamaConfig
from llamatune.strict_json import read_json

Format = Literal["hf", "meta"]
HF_HEAD, HF_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
META_HEAD, META_EMBEDDING = "output.weight", "tok_embeddings.weight"
_LLAMA_3_VOCABULARY = 128256
_CODE_LLAMA_THETA = 1e6


def detect_format(path: Path) -> Format:
    """Whether a model directory is Hugging Face's or Meta's."""
    if not _is_there(path):
        raise CheckpointError("no such model directory", path)
    if not path.is_dir():
        raise CheckpointError("a file where a model directory is expected", path, f"did you mean {path.parent}?")
    found: list[Format] = []
    if _is_there(path / "config.json"):
        found.append("hf")
    if _is_there(path / "params.json"):
        found.append("meta")
    if len(found) == 2:
        found = [name for name in found if has_weights(path, name)] or found
    if found:
        return found[0]
    if (path / "adapter_config.json").exists():
        raise CheckpointError("an adapter, not a model", path, "give the base as --model and this as --adapter")
    raise CheckpointError(
        "neither config.json (Hugging Face) nor params.json (Meta) is in it", path, "give a LLaMA model directory"
    )


def _is_there(path: Path) -> bool:
    """Whether ``path`` exists; that we may not know is a fault of its own."""
    try:
        os.stat(path)
    except OSError as fault:
        if fault.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None
    return True


def read_config(path: Path) -> LlamaConfig:
    """The shape of the model in ``path``; weights, where there are any, are looked at by their headers alone."""
    if detect_format(path) == "hf":
        return huggingface_config(path, stored_huggingface(path) if has_weights(path, "hf") else None)
    return meta_config(path, stored_meta(path) if has_weights(path, "meta") else None)


def huggingface_config(path: Path, stored: dict[str, Stored] | None) -> LlamaConfig:
    """``config.json`` as transformers 4 and 5 write it, and ``generation_config.json``'s stop tokens."""
    facts = _Facts(path / "config.json")
    if facts.raw.get("model_type") != "llama":
        facts.refuse("model_type", "only 'llama' is supported")
    facts.expect("hidden_act", "silu")
    facts.expect("attention_bias", False)
    facts.expect("mlp_bias", False)
    if facts.raw.get("quantization_config") is not None:
        facts.refuse("quantization_config", "its computation is not supported")
    heads = facts.integer("num_attention_heads")
    config = facts.build(
        hidden_size=facts.integer("hidden_size"),
        intermediate_size=facts.integer("intermediate_size"),
        num_hidden_layers=facts.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=facts.integer("num_key_value_heads", heads),
        vocab_size=facts.integer("vocab_size"),
        head_dim=facts.integer("head_dim", 0),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(facts),
        max_position_embeddings=facts.integer("max_position_embeddings", 2048),
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
        bos_token_id=facts.integer("bos_token_id", 1),
        eos_token_ids=_stop_tokens(path, facts),
    )
    if stored is None:
        return config
    head, embedding = stored.get(HF_HEAD), stored.get(HF_EMBEDDING)
    if head is None and not config.tie_word_embeddings and embedding is not None:
        raise CheckpointError(f"{HF_HEAD} is missing and tie_word_embeddings is false", path, "fetch the weights again")
    if head is not None and embedding is not None:
        tied = config.tie_word_embeddings and same_bytes(head, embedding)
        config = dataclasses.replace(config, tie_word_embeddings=tied)
    return config


def meta_config(path: Path, shards: list[dict[str, Stored]] | None) -> LlamaConfig:
    """``params.json``; the vocabulary of a ``-1`` comes from the embedding's rows, or else from the tokenizer."""
    facts = _Facts(path / "params.json")
    facts.expect("use_scaled_rope", False)
    for key in ("quantization_args", "lora_args", "moe_args"):
        if facts.raw.get(key) is not None:
            facts.refuse(key, "its computation is not supported")
    dim, heads = facts.integer("dim"), facts.integer("n_heads")
    theta = facts.number("rope_theta", 10000.0)
    multiple_of = facts.integer("multiple_of", 256)
    multiplier = facts.number("ffn_dim_multiplier", 1.0)
    if not 0 < multiple_of < 1 << 20 or not 0 < multiplier < 64 or not 0 < dim < 1 << 20:
        facts.refuse("dim, multiple_of or ffn_dim_multiplier", "no LLaMA model has it")
    vocabulary = facts.integer("vocab_size", -1)
    if vocabulary == -1:
        vocabulary = _meta_vocabulary(path, dim, shards)
    llama_3 = vocabulary == _LLAMA_3_VOCABULARY
    return facts.build(
        hidden_size=dim,
        intermediate_size=feed_forward_size(dim, multiple_of, multiplier),
        num_hidden_layers=facts.integer("n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=facts.integer("n_kv_heads", heads),
        vocab_size=vocabulary,
        rms_norm_eps=facts.number("norm_eps", 1e-5),
        rope_theta=theta,
        max_position_embeddings=_meta_positions(path, vocabulary, theta),
        tie_word_embeddings=shards is not None and not any(META_HEAD in shard for shard in shards),
        bos_token_id=128000 if llama_3 else 1,
        eos_token_ids=(128001, 128009) if llama_3 else (2,),
    )


def missing_head_warning(path: Path, format_: Format, config: LlamaConfig) -> str | None:
    """What to tell of a Meta model without a head: it may be tied, or its head may have been lost.

    Meta's format has no flag that says which. Its own files hold the head of a tied model too.
    """
    if format_ != "meta" or not config.tie_word_embeddings:
        return None
    return f"{path}: no {META_HEAD} in the weights; the embedding serves as the head (right only for a tied model)"


def feed_forward_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule for the feed-forward width (llama/model.py, ``FeedForward.__init__``)."""
    return multiple_of * -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of)


def embedding_axis(shards: list[dict[str, Stored]], dim: int) -> int:
    """Along which axis Meta split the embedding: 1 (by columns) in Llama-2's shards, 0 (by rows) in Llama-3's."""
    shape = shards[0][META_EMBEDDING].shape
    return 0 if len(shape) == 2 and shape[1] == dim else 1


def _meta_vocabulary(path: Path, dim: int, shards: list[dict[str, Stored]] | None) -> int:
    embedding = shards[0].get(META_EMBEDDING) if shards is not None else None
    if shards is not None and embedding is not None and len(embedding.shape) == 2:
        rows = embedding.shape[0]
        return rows * len(shards) if embedding_axis(shards, dim) == 0 else rows
    if (path / "tokenizer.model").exists():
        return count_tokenizer_pieces(path / "tokenizer.model")
    raise CheckpointError(
        "vocab_size is -1 and there are neither weights nor a tokenizer.model", path / "params.json",
        "put tokenizer.model beside it",
    )  # fmt: skip


def _meta_positions(path: Path, vocabulary: int, theta: float) -> int:
    """The context length, which ``params.json`` does not tell: a merge of ours noted it, Meta's models are known."""
    manifest = merge_manifest(path)
    if manifest is not None and manifest.max_position_embeddings is not None:
        return manifest.max_position_embeddings
    if vocabulary == _LLAMA_3_VOCABULARY:
        return 8192
    return 16384 if theta == _CODE_LLAMA_THETA else 4096


def merge_manifest(directory: Path) -> Manifest | None:
    """The manifest that an earlier merge left beside the model in ``directory``; None if there is none to read."""
    try:
        return find_manifest(directory)
    except LlamatuneError:
        return None


def rope_facts(theta: float) -> dict[str, Any]:
    """The base of the rotation as transformers 4, mlx-lm and Ollama read it, and as transformers 5 does."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_theta": theta}


def _rope_theta(facts: _Facts) -> float:
    """``rope_theta`` from its three homes, which must agree; transformers 5 takes ``rope_scaling`` for another name
    of ``rope_parameters``."""
    homes: dict[str, dict[str, Any]] = {"rope_theta": facts.raw}
    for key in ("rope_parameters", "rope_scaling"):
        rope = facts.raw.get(key)
        if rope is not None:
            _refuse_scaled_rope(facts, key, rope)
            homes[f"{key}.rope_theta"] = rope
    if facts.raw.get("partial_rotary_factor") not in (None, 1.0):
        facts.refuse("partial_rotary_factor", "only 1.0 is supported: anything else computes another model")
    found = {
        home: facts.number("rope_theta", 0.0, source)
        for home, source in homes.items()
        if source.get("rope_theta") is not None
    }
    if len(set(found.values())) > 1:
        told = ", ".join(f"{home} is {theta}" for home, theta in found.items())
        raise CheckpointError(told, facts.path, "readers differ in which one they take; keep the model's own alone")
    return next(iter(found.values()), 10000.0)


def _refuse_scaled_rope(facts: _Facts, key: str, rope: Any) -> None:
    if not isinstance(rope, dict):
        facts.refuse(key, "its computation is not supported")
    for name in ("rope_type", "type"):
        if rope.get(name) not in (None, "default"):
            facts.refuse(key, f"{name} {str(rope[name])[:40]!r} is not supported, only 'default'")
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if by_layer or rope.get("partial_rotary_factor") not in (None, 1.0):
        facts.refuse(key, "its computation is not supported")


def _stop_tokens(path: Path, facts: _Facts) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json where it has one, else of config.json: a number or a list."""
    generation = path / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.exists() else None
    where = generation if found is not None else facts.path
    found = facts.raw.get("eos_token_id") if found is None else found
    ids = [2] if found is None else found if isinstance(found, list) else [found]
    if not ids or not all(type(n) is int and 0 <= n < 1 << 32 for n in ids):
        raise CheckpointError(f"eos_token_id is {found!r}", where, "a token id or a list of token ids is expected")
    return tuple(ids)


class _Facts:
    """A JSON object whose values are taken out with their types checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)

    def refuse(self, key: str, why: str) -> None:
        raise CheckpointError(f"{key} is {str(self.raw.get(key))[:80]!r}", self.path, why)

    def expect(self, key: str, value: object) -> None:
        found = self.raw.get(key)
        if found is not None and (found != value or type(found) is not type(value)):
            self.refuse(key, f"only {value!r} is supported: anything else computes another model")

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._take(key, default, int, self.raw))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._take(key, default, bool, self.raw))

    def number(self, key: str, default: float, source: dict[str, Any] | None = None) -> float:
        source = self.raw if source is None else source
        if type(source.get(key)) is int and abs(source[key]) < 1 << 60:
            source = {key: float(source[key])}
        value = float(self._take(key, default, float, source))
        if not math.isfinite(value):
            self.refuse(key, "a finite number is expected")
        return value

    def _take(self, key: str, default: Any, kind: type, source: dict[str, Any]) -> Any:
        value = source.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(f"has no {key}", self.path, "fetch it again")
        if type(value) is not kind:
            names = {int: "a whole number", float: "a number", bool: "true or false"}
            raise CheckpointError(f"{key} is {str(value)[:80]!r}", self.path, f"{names[kind]} is expected")
        return value

    def build(self, **values: Any) -> LlamaConfig:
        try:
            return LlamaConfig(**values)
        except CheckpointError as fault:
            raise CheckpointError(fault.what, self.path, fault.todo) from None

"""Meta's ``params.json``, read as a ``LlamaConfig`` and written. No torch.

What it does not say comes from elsewhere: a vocabulary of -1 and a tied head from the weights' headers, the context
length from the manifest of a merge or from Meta's own models.
"""

from __future__ import annotations

from pathlib import Path

from llamatune.errors import CheckpointError
from llamatune.formats.manifest import manifest_if_readable
from llamatune.formats.safetensors import TensorLocation
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import JsonFields, read_json, write_json
from llamatune.tokenizers.loading import is_tiktoken
from llamatune.tokenizers.tiktoken_file import SPECIALS

HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"
_LLAMA_3_VOCABULARY = 128256
_CODE_LLAMA_THETA = 1e6


def read_params_json(path: Path, shards: list[dict[str, TensorLocation]] | None) -> LlamaConfig:
    """Read ``params.json``; a vocabulary of -1 is taken from the embedding's rows, or else from the tokenizer."""
    file = path / "params.json"
    facts = JsonFields(file, read_json(file))
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
    bos, ends = _meta_bos_and_eos(path, vocabulary)
    return facts.build(
        LlamaConfig,
        hidden_size=dim,
        intermediate_size=_feed_forward_size(dim, multiple_of, multiplier),
        num_hidden_layers=facts.integer("n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=facts.integer("n_kv_heads", heads),
        vocab_size=vocabulary,
        rms_norm_eps=facts.number("norm_eps", 1e-5),
        rope_theta=theta,
        max_position_embeddings=_meta_positions(path, vocabulary, theta),
        tie_word_embeddings=shards is not None and not any(HEAD in shard for shard in shards),
        bos_token_id=bos,
        eos_token_ids=ends,
    )


def _feed_forward_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule for the feed-forward width (llama/model.py, ``FeedForward.__init__``)."""
    return multiple_of * -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of)


def embedding_axis(shards: list[dict[str, TensorLocation]], dim: int) -> int:
    """Along which axis Meta split the embedding: 1 (by columns) in Llama-2's shards, 0 (by rows) in Llama-3's."""
    embedding = shards[0].get(EMBEDDING)
    return 0 if embedding is None or embedding.shape[1:] == (dim,) else 1


def _meta_vocabulary(path: Path, dim: int, shards: list[dict[str, TensorLocation]] | None) -> int:
    if shards and (embedding := shards[0].get(EMBEDDING)) and len(embedding.shape) == 2:
        return embedding.shape[0] * (len(shards) if embedding_axis(shards, dim) == 0 else 1)
    if (path / "tokenizer.model").exists():
        from llamatune.tokenizers.loading import count_pieces  # importing the library takes 40 ms

        return count_pieces(path / "tokenizer.model")
    raise CheckpointError(
        "vocab_size is -1 and there are neither weights nor a tokenizer.model", path / "params.json",
        "put tokenizer.model beside it",
    )  # fmt: skip


def _meta_bos_and_eos(path: Path, vocabulary: int) -> tuple[int, tuple[int, ...]]:
    """BOS and EOS, which ``params.json`` does not hold: of Llama 3's 256 special tokens, or SentencePiece's own."""
    file = path / "tokenizer.model"
    if vocabulary == _LLAMA_3_VOCABULARY or (file.exists() and is_tiktoken(file)):
        first = vocabulary - SPECIALS
        return first, (first + 1, first + 9)  # <|end_of_text|> and, of the chat models, <|eot_id|>
    return 1, (2,)


def _meta_positions(path: Path, vocabulary: int, theta: float) -> int:
    """The context length, which ``params.json`` does not hold: from the manifest of a merge, or of Meta's models."""
    manifest = manifest_if_readable(path)
    if manifest is not None and manifest.max_position_embeddings is not None:
        return manifest.max_position_embeddings
    if vocabulary == _LLAMA_3_VOCABULARY:
        return 8192
    return 16384 if theta == _CODE_LLAMA_THETA else 4096


def write_params_json(directory: Path, config: LlamaConfig) -> None:
    """Write ``params.json``, which states neither the feed-forward width nor the head dimension."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"head_dim {config.head_dim} x {config.num_attention_heads} heads is not hidden_size {config.hidden_size}",
            "params.json", "Meta's format cannot say this; use --format hf",
        )  # fmt: skip
    multiple_of, multiplier = _feed_forward_settings(config)
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "multiple_of": multiple_of,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "n_kv_heads": config.num_key_value_heads if config.num_key_value_heads != config.num_attention_heads else None,
        "ffn_dim_multiplier": multiplier,
        "rope_theta": config.rope_theta if config.rope_theta != 10000.0 else None,
    }
    write_json(directory / "params.json", {name: value for name, value in params.items() if value is not None})


def _feed_forward_settings(config: LlamaConfig) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give the width: Meta's own values first, then any."""
    dim, width = config.hidden_size, config.intermediate_size
    for multiplier in (None, 1.3, 1.5):
        for multiple_of in (256, 1024, 4096, 512, 2048, 128, 64, 32, 16, 8, 4, 2, 1):
            if _feed_forward_size(dim, multiple_of, multiplier or 1.0) == width:
                return multiple_of, multiplier
    multiplier = (width + 0.5) / int(2 * 4 * dim / 3)  # int() of the product is the width itself
    assert _feed_forward_size(dim, 1, multiplier) == width
    return 1, multiplier

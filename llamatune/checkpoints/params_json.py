"""Meta's ``params.json``, read as a ``LlamaConfig`` and written. No torch.

What it does not say comes from elsewhere: a vocabulary of -1 and a tied head from the weights' headers, the context
length from the manifest of a merge or from Meta's own models. Mistral's own files say more than Meta's: the widths of
heads and of the feed-forward, and the sliding window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.formats.manifest import manifest_if_readable
from llamatune.formats.safetensors import TensorLocation
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.rope_scaling import Llama3Scaling
from llamatune.strict_json import JsonFields, read_json, write_json
from llamatune.tokenizers.loading import is_tiktoken
from llamatune.tokenizers.tiktoken_file import SPECIALS

HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"
LLAMA_3_VOCABULARY = 128256
_LLAMA_3_POSITIONS, _LLAMA_31_POSITIONS = 8192, 131072
_CODE_LLAMA_THETA, _CODE_LLAMA_POSITIONS = 1e6, 16384
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
_LLAMA_32 = ((2048, 16), (3072, 28))
"""Width and depth of Llama 3.2's text models, whose published factor is 32; their params.json does not hold it."""


def read_params_json(path: Path, shards: list[dict[str, TensorLocation]] | None) -> LlamaConfig:
    """Read ``params.json``; a vocabulary of -1 is taken from the embedding's rows, or else from the tokenizer."""
    file = path / "params.json"
    facts = JsonFields(file, read_json(file))
    for key in ("quantization_args", "lora_args", "moe_args", "moe", "vision_chunk_size", "vision_encoder"):
        if facts.raw.get(key) not in (None, -1):
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
    scaling, window = _scaling(facts), facts.integer("sliding_window", 0) or None
    width = facts.integer("hidden_dim", 0) or _feed_forward_size(dim, multiple_of, multiplier)
    bos, ends = _meta_bos_and_eos(path, vocabulary, scaling is not None)
    return facts.build(
        LlamaConfig,
        hidden_size=dim,
        intermediate_size=width,
        num_hidden_layers=facts.integer("n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=facts.integer("n_kv_heads", heads),
        vocab_size=vocabulary,
        rms_norm_eps=facts.number("norm_eps", 1e-5),
        head_dim=facts.integer("head_dim", 0),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        model_type="llama" if window is None else "mistral",
        max_position_embeddings=_meta_positions(path, facts, vocabulary, theta, scaling),
        tie_word_embeddings=shards is not None and not any(HEAD in shard for shard in shards),
        bos_token_id=bos,
        eos_token_ids=ends,
    )


def _scaling(facts: JsonFields) -> Llama3Scaling | None:
    """Llama 3.1's, of which Meta's files state that it is there, and in some the factors (``llama_models``)."""
    if not facts.flag("use_scaled_rope", False):
        return None
    factor = facts.number("rope_scaling_factor", _usual_factor(facts.integer("dim"), facts.integer("n_layers")))
    high = facts.number("rope_high_freq_factor", _HIGH_FREQ_FACTOR)
    return facts.build(
        Llama3Scaling, factor=factor, low_freq_factor=_LOW_FREQ_FACTOR, high_freq_factor=high,
        original_max_position_embeddings=_LLAMA_3_POSITIONS,
    )  # fmt: skip


def _usual_factor(dim: int, layers: int) -> float:
    return 32.0 if (dim, layers) in _LLAMA_32 else 8.0


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


def _meta_bos_and_eos(path: Path, vocabulary: int, scaled: bool) -> tuple[int, tuple[int, ...]]:
    """BOS and EOS, which ``params.json`` does not hold: of Llama 3's 256 special tokens, or SentencePiece's own.

    ``scaled`` rope came with Llama 3.1, and <|eom_id|> with it.
    """
    file = path / "tokenizer.model"
    if vocabulary == LLAMA_3_VOCABULARY or (file.exists() and is_tiktoken(file)):
        first = vocabulary - SPECIALS
        end_of_message = (first + 8,) if scaled else ()
        return first, (first + 1, *end_of_message, first + 9)  # <|end_of_text|> and, of the chat models, <|eot_id|>
    return 1, (2,)


def _meta_positions(path: Path, facts: JsonFields, vocabulary: int, theta: float, scaling: Llama3Scaling | None) -> int:
    """The context length: from the manifest of a merge, or as Meta's and Mistral's models were trained."""
    manifest = manifest_if_readable(path)
    if manifest is not None and manifest.max_position_embeddings is not None:
        return manifest.max_position_embeddings
    if scaling is not None:
        return _LLAMA_31_POSITIONS
    if vocabulary == LLAMA_3_VOCABULARY:
        return _LLAMA_3_POSITIONS
    if "hidden_dim" in facts.raw:  # Mistral's
        return 32768
    return _CODE_LLAMA_POSITIONS if theta == _CODE_LLAMA_THETA else 4096


def write_params_json(directory: Path, config: LlamaConfig) -> None:
    """Write ``params.json``, which states neither the feed-forward width nor the head dimension."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"head_dim {config.head_dim} x {config.num_attention_heads} heads is not hidden_size {config.hidden_size}",
            "params.json", "Meta's format cannot say this; use --format hf",
        )  # fmt: skip
    scaling, additions = config.rope_scaling, config.added_tensors()
    scaled = isinstance(scaling, Llama3Scaling) and (
        (scaling.low_freq_factor, scaling.original_max_position_embeddings) == (_LOW_FREQ_FACTOR, _LLAMA_3_POSITIONS)
    )
    if scaling is not None and not scaled:
        additions = f"the rope type {scaling.kind!r} with {scaling.facts()}"
    if config.sliding_window is not None:
        additions = f"sliding_window {config.sliding_window}"
    if additions is not None:
        raise CheckpointError(additions, "params.json", "Meta's format cannot say this; use --format hf")
    multiple_of, multiplier = _feed_forward_settings(config)
    params: dict[str, Any] = {
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
    if isinstance(scaling, Llama3Scaling):
        params["use_scaled_rope"] = True
        if scaling.factor != _usual_factor(config.hidden_size, config.num_hidden_layers):
            params["rope_scaling_factor"] = scaling.factor
        if scaling.high_freq_factor != _HIGH_FREQ_FACTOR:
            params["rope_high_freq_factor"] = scaling.high_freq_factor
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

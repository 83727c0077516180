"""What decides the answers that an output file keeps: it is continued with equal settings alone (``answer_log``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from llamatune.checkpoints.adapter_sum import facts_of
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.templates import Template
from llamatune.inference.model_source import OpenedModel
from llamatune.inference.prompt_files import FilePrompt, Prompt
from llamatune.tokenizers.tokenizer import Tokenizer

_REVISION = 1  # of ``generate``: raise it when the same settings come to give other answers


def model_settings(source: ModelSource, opened: OpenedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of the model, its adapters and its tokenizer."""
    adapter: Any = None
    if opened.adapter is not None:
        alone = opened.adapter is opened.adapters[0]
        adapter = {"sha256": opened.adapter.digest, "scaling": opened.adapter.config.scaling()}
        adapter = adapter if alone else facts_of(opened.adapters, source.adapter_weights)
    merged = {"merged": True} if opened.merges else {}  # which is rounded otherwise
    return {
        "model": fingerprint(opened.checkpoint),
        "adapter": adapter,
        **merged,
        "compare": opened.compare,
        "dtype": opened.dtype_name,
        "tokenizer": tokenizer.fingerprint,
    }


def generation_settings(
    of_model: dict[str, Any],
    prompts: Sequence[Prompt],
    template: Template | ChatTemplate | None,
    sampling: Sampling,
    stop: Sequence[str],
) -> dict[str, Any]:
    """Of ``generate``. A prompt file may have another name or place."""
    told = [(each.asked, each.row, each.reference) if isinstance(each, FilePrompt) else each for each in prompts]
    return {
        "task": "generate",
        "revision": _REVISION,
        **of_model,
        "prompts": hashlib.sha256("\n".join(map(repr, told)).encode("utf-8", "surrogatepass")).hexdigest(),
        "template": None if template is None else template.to_dict(),
        **{field.name: getattr(sampling, field.name) for field in fields(Sampling)},
        "stop": list(stop),
    }

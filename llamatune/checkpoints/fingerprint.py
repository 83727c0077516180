"""The fingerprint of a base model: a digest that is equal for copies of the same weights in either format."""

from __future__ import annotations

import hashlib
import json

import torch

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.config_json import EMBEDDING, HEAD
from llamatune.checkpoints.tensor_bytes import tensor_bytes

_SAMPLED_ROWS = 16


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, shapes and 16 evenly spread rows of every tensor (elements of a vector).

    Names and order are Hugging Face's, rows are float32 values: copies in either format, or in a wider dtype, agree.
    The head is always part of it: the embedding when tied. Reads a few hundred kilobytes to a few tens of megabytes.
    """
    digest, shapes = hashlib.sha256(), checkpoint.shapes
    sources = {name: name for name in shapes} | {HEAD: HEAD if HEAD in shapes else EMBEDDING}
    for name, source in sources.items():
        shape = shapes[source]
        digest.update(json.dumps([name, shape]).encode())
        count = min(_SAMPLED_ROWS, shape[0])
        rows = [index * (shape[0] - 1) // max(1, count - 1) for index in range(count)]
        sample = checkpoint.rows(source, rows).to(torch.float32).contiguous()
        digest.update(tensor_bytes(sample))
    return f"sha256:{digest.hexdigest()}"

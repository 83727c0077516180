"""Check of a SentencePiece model before use: the library crashes on malformed ones, so a child reads it first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import sentencepiece

from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.required_versions import require_version
from llamatune.safe_reading import digest_bytes, read_bytes

LARGEST_MODEL_BYTES = 64 << 20
"""LLaMA's tokenizer.model has 0.5 MB; no published SentencePiece model comes near this limit."""

_OTHER_FORMATS = (
    (rb"\Z", "an empty file, not a tokenizer", "fetch it again"),
    (
        rb"\s*version https://git-lfs",
        "a git-lfs pointer, not the tokenizer itself",
        "run `git lfs pull` where you cloned it",
    ),
    (
        rb"(?i)\s*<(!doc|html|\?xml)",
        "an HTML page, not a tokenizer",
        "fetch it again (a login page was saved in its place?)",
    ),
    (rb"\s*PK\x03\x04", "a zip archive, not a tokenizer", "give the path of a tokenizer.model or tokenizer.json"),
)
"""What a file is by the pattern at its beginning, and what to do about it."""

_PROBE_TIMEOUT_S = 120
_PROBE = """
import resource, sys
sys.path[:] = {path}
import sentencepiece
allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
size = 4 << 30 if allowed == resource.RLIM_INFINITY else min(4 << 30, allowed)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
print("ready", flush=True)
model = sentencepiece.SentencePieceProcessor(model_proto=sys.stdin.buffer.read())
for text in ("", " ", "The 2 llamas", "\\u00e9\\u65e5\\U0001f999\\n\\t", "a" * 300):
    ids = model.encode(text, return_type="offset_mapping")["ids"]
    model.decode(ids)
for i in range(model.vocab_size()):
    model.id_to_piece(i)
"""

_sound_models: set[str] = set()


def read_checked(path: Path) -> bytes:
    """The bytes of a SentencePiece model. Each model is first parsed in a child: malformed ones crash the library."""
    require_version("sentencepiece", sentencepiece.__version__)
    model = read_bytes(path, max_bytes=LARGEST_MODEL_BYTES)
    for pattern, what, todo in _OTHER_FORMATS:
        if re.match(pattern, model):
            raise CheckpointError(what, path, todo)
    fingerprint = digest_bytes(model)
    if fingerprint not in _sound_models:
        _probe(model, path)
        _sound_models.add(fingerprint)
    return model


def _probe(model: bytes, path: Path) -> None:
    code = _PROBE.format(path=json.dumps([entry for entry in sys.path if entry]))
    command = [sys.executable, "-I", "-S", "-c", code]
    unsound = CheckpointError("not a sound SentencePiece model", path, "fetch the model's tokenizer.model again")
    try:
        child = subprocess.run(command, input=model, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except OSError as fault:
        raise EnvironmentFault(f"cannot start a process to check the tokenizer: {fault.strerror}", path) from None
    except subprocess.TimeoutExpired:
        raise unsound from None
    if not child.stdout.startswith(b"ready"):
        raise EnvironmentFault("a process to check the tokenizer did not start", path, "is there memory left?")
    if child.returncode != 0:
        raise unsound

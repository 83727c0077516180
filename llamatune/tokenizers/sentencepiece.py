"""SentencePiece tokenizer, that of LLaMA 1 and 2: loading ``tokenizer.model``, encoding and decoding."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

import sentencepiece

from llamatune.errors import CheckpointError, DataError, EnvironmentFault
from llamatune.events import OnEvent, ignore_event
from llamatune.required_versions import require_version
from llamatune.safe_reading import digest_bytes, read_bytes
from llamatune.tokenizers.agreement import check_agreement
from llamatune.tokenizers.tokenizer import SENTENCEPIECE_FILE, Tokenizer

LARGEST_MODEL_BYTES = 64 << 20
"""LLaMA's tokenizer.model has 0.5 MB; no published SentencePiece model comes near this limit."""

_ONLY_SENTENCEPIECE = "only SentencePiece models are supported here"
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
    (
        rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n",
        "a tiktoken file (Llama 3), not a SentencePiece model",
        f"{_ONLY_SENTENCEPIECE}: use a LLaMA 1 or 2 model with its tokenizer.model",
    ),
    (
        rb"\s*\{",
        "a tokenizer.json (or other JSON), not a SentencePiece model",
        f"{_ONLY_SENTENCEPIECE}: give the model's tokenizer.model",
    ),
    (rb"\s*PK\x03\x04", "a zip archive, not a tokenizer", "give the path of a SentencePiece tokenizer.model"),
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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with BOS and EOS.

    A pickle holds the model's bytes, so that a worker process needs neither the file nor another check.

    Args:
        model: the bytes of a ``tokenizer.model`` that ``load_tokenizer`` has checked.
        path: the file they were read from.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        self._model = model
        self.path = path
        self.fingerprint = f"sha256:{digest_bytes(model)}"
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, Path]]:
        return SentencePieceTokenizer, (self._model, self.path)

    def encode(self, text: str) -> list[int]:
        _refuse_surrogates(text)
        return [self.bos_id, *self._processor.encode(text)]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        text = prompt + completion
        if not prompt or not completion:
            ids = self.encode(text)
            return ids, 1 if completion else len(ids)
        _refuse_surrogates(text)
        encoded = self._processor.encode(text, return_type="offset_mapping")
        offsets: list[tuple[int, int]] = encoded["offsets"]
        boundary = len(prompt)
        first = bisect_right(offsets, boundary, key=itemgetter(1))
        # Of several pieces of one character only the last has a width; the others are empty, at its beginning.
        while first > 0 and offsets[first - 1] == (boundary, boundary):
            first -= 1
        return [self.bos_id, *encoded["ids"]], 1 + first

    def decode(self, ids: Iterable[int]) -> str:
        processor = self._processor
        plain = [i for i in ids if 0 <= i < self.vocab_size and not processor.is_control(i)]
        return str(processor.decode(plain))

    def pieces(self) -> list[str]:
        return list(self._processor.id_to_piece(list(range(self.vocab_size))))

    def piece(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))


def load_tokenizer(path: Path, on_event: OnEvent = ignore_event) -> SentencePieceTokenizer:
    """The tokenizer in a ``tokenizer.model`` file, or in a directory that holds one.

    Raises:
        CheckpointError: no SentencePiece model, a broken one, one without BOS or EOS, or one that the files beside it
            contradict.
    """
    if path.is_dir():
        if not (path / SENTENCEPIECE_FILE).exists():
            what, todo = "no tokenizer.model in this directory", "give the path of a SentencePiece model"
            if (path / "tokenizer.json").exists():
                what = "a tokenizer.json but no tokenizer.model"
                todo = f"{_ONLY_SENTENCEPIECE}: put the model's original tokenizer.model beside it"
            raise CheckpointError(what, path, todo)
        path /= SENTENCEPIECE_FILE
    tokenizer = SentencePieceTokenizer(_read_checked(path), path)
    for name, token_id in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)):
        if not 0 <= token_id < tokenizer.vocab_size:
            raise CheckpointError(f"the tokenizer has no {name} token", path, "use LLaMA's own tokenizer.model")
    check_agreement(path, tokenizer.pieces(), tokenizer.bos_id, tokenizer.eos_id, on_event)
    return tokenizer


def count_pieces(path: Path) -> int:
    """The vocabulary size of a ``tokenizer.model`` file; ``CheckpointError`` if it is no SentencePiece model."""
    return int(sentencepiece.SentencePieceProcessor(model_proto=_read_checked(path)).vocab_size())


def _read_checked(path: Path) -> bytes:
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


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise DataError(f"the text holds a lone surrogate at character {fault.start}, which is no character") from None

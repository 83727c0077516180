"""Opens the tokenizer of a model directory, of whichever format."""

from __future__ import annotations

import re
from pathlib import Path

from llamatune.errors import CheckpointError
from llamatune.events import OnEvent, ignore_event
from llamatune.safe_reading import open_regular, read_faults
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer

_TIKTOKEN = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_JSON_VALUE = re.compile(rb"\s*(\[|null|\"|\d)")
_JSON = re.compile(rb"(\xef\xbb\xbf)?\s*\{")


def tokenizer_file(path: Path) -> Path | None:
    """The file that holds the tokenizer of a directory; None: it has none. A file is itself.

    ``tokenizer.model`` comes first, unless it is tiktoken's: beside a ``tokenizer.json`` that is a copy of Meta's file.
    """
    if not path.is_dir():
        return path
    model, definition = path / SENTENCEPIECE_FILE, path / JSON_FILE
    if definition.exists() and not (model.exists() and not is_tiktoken(model)):
        return definition
    return model if model.exists() else None


def load_tokenizer(path: Path, on_event: OnEvent = ignore_event, option: str | None = None) -> Tokenizer:
    """The tokenizer in a file, or in a directory that holds one. ``option`` is that which names it, for errors.

    Raises:
        CheckpointError: no tokenizer, a broken one, one without EOS, one of another kind than LLaMA and its relatives
            have, or one that the files beside it contradict.
    """
    file = tokenizer_file(path)
    if file is None:
        todo = "copy the model's tokenizer.model or tokenizer.json into it"
        todo = f"{todo}, or name it with {option}" if option else todo
        above = path.absolute().parent / SENTENCEPIECE_FILE
        if above.exists():
            todo = f"LLaMA-1 has it beside the models' directories: link {above} into this one"
        raise CheckpointError("no tokenizer.model or tokenizer.json in this directory", path, todo)
    # The libraries are imported where they are needed: each takes about 50 ms.
    if _begins(file, _JSON) or (file.suffix == ".json" and _begins(file, _JSON_VALUE)):
        from llamatune.tokenizers.tokenizer_json import load_json, refuse_other_ranks

        tokenizer = load_json(file, on_event)
        if file != path and (path / SENTENCEPIECE_FILE).exists():
            refuse_other_ranks(tokenizer, path / SENTENCEPIECE_FILE)
        return tokenizer
    if is_tiktoken(file):
        from llamatune.tokenizers.tokenizer_json import load_tiktoken

        return load_tiktoken(file, on_event)
    from llamatune.tokenizers.sentencepiece import load_sentencepiece

    return load_sentencepiece(file, on_event)


def count_pieces(path: Path) -> int:
    """The vocabulary size of a ``tokenizer.model`` of Meta's format; ``CheckpointError`` if it is none."""
    if is_tiktoken(path):
        from llamatune.tokenizers.tiktoken_file import SPECIALS, read_ranks

        return len(read_ranks(path)) + SPECIALS
    if _begins(path, _JSON):
        return load_tokenizer(path).vocab_size
    from llamatune.tokenizers.sentencepiece import count_pieces as count_sentencepiece

    return count_sentencepiece(path)


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as tiktoken's do, of Meta's Llama 3."""
    return _begins(path, _TIKTOKEN)


def _begins(path: Path, pattern: re.Pattern[bytes]) -> bool:
    with open_regular(path) as file, read_faults(path):
        return pattern.match(file.read(4096)) is not None

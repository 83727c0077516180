"""General English text, that of the package and the user's, in windows of tokens: what forgetting is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from llamatune.data.raw_row import RowError
from llamatune.data.row_files import BEGINS_AS_JSON, file_kind, read_raw_rows, read_text
from llamatune.data.row_json import decode_row, text_field
from llamatune.data.windows import Window, split_windows
from llamatune.errors import DataError
from llamatune.tokenizers.tokenizer import Tokenizer, refuse_surrogates

PACKAGED = Path(str(resources.files("llamatune.judging"))) / "general_text.jsonl"
"""A passage a line: ``text``, and its ``source``."""

PACKAGED_NAME = "packaged"
MOST_TOKENS = 512
"""Of a window."""

_LARGEST_TEXT = 64 << 20


@dataclass(frozen=True)
class Texts:
    """Documents, and their windows as rows of tokens."""

    name: str
    path: str
    documents: tuple[str, ...]
    windows: tuple[Window, ...]


def read_documents(path: Path) -> tuple[str, ...]:
    """The texts of a file: the ``text`` of each JSON row, or the file as one text.

    Raises:
        DataError: no text, not UTF-8, or a row without one.
    """
    documents = tuple(_documents(path))
    if not any(document.strip() for document in documents):
        raise DataError("no text", path, "give a text of some hundred words")
    return documents


def _documents(path: Path) -> Iterator[str]:
    if file_kind(path) in ("table", "columnar") or BEGINS_AS_JSON.match(read_text(path, _LARGEST_TEXT)):
        for raw in read_raw_rows(path):
            try:
                yield text_field(decode_row(raw), "text")
            except RowError as fault:
                raise DataError(fault.what, raw.place(path), "rows of text have a field 'text'") from None
        return
    content = read_text(path, _LARGEST_TEXT)
    try:
        text = content.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", path, "convert it with iconv") from None
    if "\0" in text:
        raise DataError(f"a NUL character at {text.index(chr(0))}", path, "give a text file")
    yield text


def make_texts(
    name: str, path: Path, tokenizer: Tokenizer, known_tokens: int, limit: int | None, documents: Sequence[str] = ()
) -> Texts:
    """The windows of a file's texts, each of at most 512 tokens and ``known_tokens``, all tokens behind BOS targets.

    Without a BOS a text's first token is no target, since nothing predicts it.
    """
    documents = tuple(documents) or read_documents(path)
    most, beginning = min(MOST_TOKENS, known_tokens), len(tokenizer.beginning)
    windows = list[Window]()
    for document in documents:
        refuse_surrogates(document)
        ids = tokenizer.encode(document)
        first = max(beginning, 1)
        if len(ids) > first:
            targets = [(first, len(ids))]
            whole = Window(ids, targets, 0)
            windows += [whole] if len(ids) <= most else split_windows(ids, targets, beginning, most, 0)
    windows = [window for window in windows if window.targets][:limit]
    if not windows:
        raise DataError("too little text: no token has one before it", path, "give a text of some hundred words")
    return Texts(name, str(path), documents, tuple(windows))

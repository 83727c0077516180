"""Tokenizers of a ``tokenizer.json`` (Llama 3, Qwen, SmolLM), encoded by Hugging Face's ``tokenizers`` library."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import digest_bytes, digest_file
from llamatune.strict_json import read_json
from llamatune.tokenizers.added_tokens import (
    ADDED,
    CONFIG,
    LARGEST_JSON_BYTES,
    ROLES,
    TokenizerFiles,
    listed,
    model_ids,
    vocabulary_of,
)
from llamatune.tokenizers.agreement import added_beyond, check_model_id
from llamatune.tokenizers.byte_level import CHARACTERS, UTF8_BYTES, bytes_of, readable, spelled
from llamatune.tokenizers.json_definition import check_definition, kinds_of, templates_of
from llamatune.tokenizers.library_definition import HIDDEN, library_definition, prefixes, without_prefix
from llamatune.tokenizers.tiktoken_file import config_of, definition_of, read_ranks
from llamatune.tokenizers.tokenizer import JSON_FILE, Encoded, Tokenizer, refuse_surrogates

_COMPOSING = {"NFC", "NFKC"}


@dataclass(frozen=True)
class JsonFacts:
    """What ``JsonTokenizer`` knows beside the library's definition; names as in ``Tokenizer``.

    ``byte_level``: its pieces spell bytes. ``composes``: it joins marks to the character before them. ``prefixes``: it
    puts a space before a text.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    special_ids: Mapping[str, int]
    matches_words: bool
    byte_level: bool
    composes: bool
    prefixes: bool


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``: a definition that ``tokenizer_of`` has checked. Its pickle holds the definition."""

    def __init__(self, definition: str, facts: JsonFacts) -> None:
        self._definition, self._facts = definition, facts
        self.path, self.fingerprint, self.vocab_size = facts.path, facts.fingerprint, facts.vocab_size
        self.bos_id, self.eos_id = facts.bos_id, facts.eos_id
        self.special_ids, self.matches_words = facts.special_ids, facts.matches_words
        self._texts = {token_id: text for text, token_id in facts.special_ids.items()}
        with _library_faults(facts.path):
            self._library = Library.from_str(definition)

    def __reduce__(self) -> tuple[type[JsonTokenizer], tuple[str, JsonFacts]]:
        return JsonTokenizer, (self._definition, self._facts)

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        with _library_faults(self.path):
            return [*self.beginning, *self._library.encode(text, add_special_tokens=False).ids]

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        if self._facts.prefixes:
            return self.encode_with_offsets(text, before)[0]
        return self.encode(text)[len(self.beginning) :]

    @functools.cached_property
    def _continuing(self) -> Library:
        with _library_faults(self.path):
            return Library.from_str(without_prefix(self._definition))

    @functools.cached_property
    def splits(self) -> bool:
        """Not where text behind an added word gets a space as well, which only encoding the whole puts there."""
        return not (self._facts.prefixes and self.matches_words) and super().splits

    def encode_with_offsets(self, text: str, before: Sequence[int] | None = None) -> Encoded:
        refuse_surrogates(text)
        library = self._library if before is None or not self._facts.prefixes else self._continuing
        with _library_faults(self.path):
            encoded = library.encode(text, add_special_tokens=False)
            ids, offsets = encoded.ids, encoded.offsets
        return ids, _with_marks(text, offsets) if self._facts.composes else offsets

    def encode_mixed(self, parts: Sequence[tuple[str, int | None]], before: Sequence[int] | None = None) -> Encoded:
        names = [text if special is None else str(self._library.id_to_token(special)) for text, special in parts]
        ids, offsets = self.encode_with_offsets("".join(names), before)
        if [i for i in ids if i in self._texts] != [special for _, special in parts if special is not None]:
            raise CheckpointError("a special token of it cannot be put between texts", self.path, "fetch it again")
        longer = (
            len(name) - len(text) for name, (text, special) in zip(names, parts, strict=True) if special is not None
        )
        shown, shift = list[tuple[int, int]](), 0
        for token, (begin, end) in zip(ids, offsets, strict=True):
            shown.append((begin - shift, end - shift))
            if token in self._texts:  # its name in the library is longer than its text
                shift += next(longer)
                shown[-1] = shown[-1][0], end - shift
        return ids, shown

    def decode(self, ids: Iterable[int]) -> str:
        plain = [i for i in ids if 0 <= i < self.vocab_size and i not in self._texts]
        with _library_faults(self.path):
            return str(self._library.decode(plain, skip_special_tokens=False))

    def has(self, text: str, token_id: int | None) -> bool:
        """Whether a token, as its file spells it, has this id."""
        found = None if token_id is None else self._library.id_to_token(token_id)
        if found is not None and text in self.special_ids:
            return found.startswith(HIDDEN) and found.endswith(f" {self.special_ids[text]}")
        return found == text

    def pieces(self) -> list[str]:
        return [self.piece(i) for i in range(self.vocab_size)]

    def piece(self, token_id: int) -> str:
        if token_id in self._texts:
            return self._texts[token_id]
        text = self._library.id_to_token(token_id) or ""
        return readable(text) if self._facts.byte_level else text

    def token_bytes(self, token_id: int) -> bytes:
        text = "" if token_id in self._texts else self._library.id_to_token(token_id) or ""
        return bytes_of(text) if text and self._facts.byte_level else super().token_bytes(token_id)


def load_json(path: Path, on_event: OnEvent = ignore_event) -> JsonTokenizer:
    """The tokenizer in a ``tokenizer.json``, and in the files beside it if it has that name.

    Raises:
        CheckpointError: one of another kind, a malformed one, one without EOS, or one that the files beside it
            contradict.
    """
    raw = read_json(path, max_bytes=LARGEST_JSON_BYTES)
    check_definition(raw, path)
    beside = (ADDED, CONFIG, ROLES) if path.name == JSON_FILE else ()
    return tokenizer_of(raw, TokenizerFiles(path.parent, beside, {JSON_FILE: raw}), path, on_event)


def load_tiktoken(path: Path, on_event: OnEvent = ignore_event) -> JsonTokenizer:
    """The tokenizer in the ``tokenizer.model`` of a Llama 3 of Meta's; ``CheckpointError`` if it is malformed."""
    raw = definition_of(read_ranks(path))
    files = TokenizerFiles(path.parent, (), {JSON_FILE: raw, CONFIG: config_of()})
    return tokenizer_of(raw, files, path, on_event, f"sha256:{digest_file(path)}")


def refuse_other_ranks(tokenizer: JsonTokenizer, path: Path) -> None:
    """Raise ``CheckpointError`` if the ``tokenizer.json`` beside tiktoken's file at ``path`` lacks tokens of it."""
    ranks = [(spelled(token), rank) for token, rank in read_ranks(path).items()]
    other = [(token, rank) for token, rank in ranks if not tokenizer.has(token, rank)]
    if other:
        raise CheckpointError(f"{JSON_FILE} lacks its tokens {listed(other)}", path, "use a model whose files agree")


def tokenizer_of(
    raw: dict[str, Any], files: TokenizerFiles, path: Path, on_event: OnEvent, fingerprint: str | None = None
) -> JsonTokenizer:
    """The tokenizer of a checked definition, with what ``files`` add to it.

    ``fingerprint`` None: a digest of all that determines ids.
    """
    known = _known_tokens(files, raw, path)
    added = added_beyond(files, known, path.name, on_event)
    ids = known | {token.text: token.id for token in added if token.id is not None}
    named = {token.text for token in files.tokens if token.special} | {t.text for t in added if t.is_special}
    specials = {text: token_id for text, token_id in ids.items() if text in named}
    bos, eos = _bos(files, raw, ids, path, on_event), _eos(files, ids, path)
    for text in (bos, eos):
        if text is not None and text not in ids:
            raise CheckpointError(f"it has no token {text[:40]!r}, its BOS or EOS", path, "fetch it again")
        if text is not None:
            specials.setdefault(text, ids[text])
    check_model_id(path.parent, "eos_token_id", ids[eos], eos, path.name)
    if bos is not None:
        check_model_id(path.parent, "bos_token_id", ids[bos], bos, path.name)
    byte_level = "ByteLevel" in kinds_of(raw, "decoder")
    if byte_level and (lacking := [b for b in UTF8_BYTES if CHARACTERS[b] not in ids]):
        on_event(Notice(f"{path}: {len(lacking)} bytes have no token, so characters with them are left out", "warning"))
    own = [token for token in files.tokens if token.file == files.directory / JSON_FILE]
    text = library_definition(raw, [*own, *added], specials, path)
    settings = json.dumps([sorted(specials.items()), bos, eos], ensure_ascii=False)
    facts = JsonFacts(
        path,
        fingerprint or f"sha256:{digest_bytes((text + settings).encode())}",
        max(ids.values()) + 1,
        None if bos is None else ids[bos],
        ids[eos],
        specials,
        any(token.text not in specials for token in [*own, *added]),
        byte_level,
        composes=not _COMPOSING.isdisjoint(kinds_of(raw, "normalizer")),
        prefixes=prefixes(raw),
    )
    tokenizer = JsonTokenizer(text.replace(HIDDEN, f"{HIDDEN}{secrets.token_hex(16)} "), facts)
    misplaced = [(token.text, token.id) for token in [*own, *added] if not tokenizer.has(token.text, token.id)]
    if misplaced:
        raise CheckpointError(f"added tokens under ids that leave a gap: {listed(misplaced)}", path, "fetch it again")
    return tokenizer


def _known_tokens(files: TokenizerFiles, raw: dict[str, Any], path: Path) -> dict[str, int]:
    """Ids of the vocabulary and the added tokens of ``tokenizer.json`` itself."""
    known: dict[str, int] = dict(vocabulary_of(raw))
    taken = {token_id: text for text, token_id in known.items()}
    for token in files.tokens:
        if token.file == files.directory / JSON_FILE and token.id is not None:
            if (
                known.setdefault(token.text, token.id) != token.id
                or taken.setdefault(token.id, token.text) != token.text
            ):
                what = f"an added token twice, or under the id of another: {listed([(token.text, token.id)])}"
                raise CheckpointError(what, path, "fetch it again")
            if not 0 <= token.id < 1 << 22 or len(token.text) > 4096:
                raise CheckpointError(f"malformed: an added token has id {token.id}", path, "fetch it again")
    return known


def _bos(
    files: TokenizerFiles, raw: dict[str, Any], ids: Mapping[str, int], path: Path, on_event: OnEvent
) -> str | None:
    """The BOS that the post-processor puts before a text; ``add_bos_token`` does not count, as in transformers 5."""
    templates = templates_of(raw)
    around = [part["SpecialToken"]["id"] for t in templates for part in t["single"] if "SpecialToken" in part]
    if len(around) > 1 or not all("Sequence" in template["single"][-1] for template in templates):
        what = f"its post_processor puts {', '.join(map(repr, around))[:80]} around a text, not a BOS before it"
        raise CheckpointError(what, path, "use a model that puts at most a BOS before a text")
    for text, template in itertools.product(around, templates):
        try:
            stated = template["special_tokens"][text]["ids"]
        except (LookupError, TypeError):
            raise CheckpointError("malformed: its post_processor cannot be read", path, "fetch it again") from None
        if stated != [ids.get(text)]:
            what = f"its post_processor gives {text[:40]!r} the ids {str(stated)[:40]}, its vocabulary {ids.get(text)}"
            raise CheckpointError(what, path, "fetch it again")
    for flag, done in (("add_bos_token", bool(around)), ("add_eos_token", False)):
        if files.puts(flag) not in (None, done):
            what = (
                f"{files.directory / CONFIG}: {flag} is {str(not done).lower()}, but the post_processor of {path.name}"
            )
            on_event(
                Notice(f"{what} decides, as in transformers 5, and does {'' if done else 'not '}add it", "warning")
            )
    return around[0] if around else None


def _eos(files: TokenizerFiles, ids: Mapping[str, int], path: Path) -> str:
    """The tokenizer's EOS, or else the first of the model's."""
    named = files.role("eos_token")
    if named is not None:
        return named[0]
    texts = {token_id: text for text, token_id in ids.items()}
    for stated in model_ids(path.parent, "eos_token_id").values() if path.name == JSON_FILE else ():
        if stated[0] in texts:
            return texts[stated[0]]
    raise CheckpointError("no file names its EOS", path, 'add a tokenizer_config.json with "eos_token" beside it')


def _with_marks(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets with every mark that normalising joined to a character, which the library leaves out; ends in order."""
    if unicodedata.is_normalized("NFC", text):
        return offsets
    ends, begin_after, own_begin = list[int](), len(text), len(text)
    for begin, end in reversed(offsets):
        if begin < own_begin:
            begin_after, own_begin = own_begin, begin
        ends.append(end if text[end:begin_after].isspace() else max(end, begin_after))
    in_order = itertools.accumulate(reversed(ends), max)
    return [(begin, end) for (begin, _), end in zip(offsets, in_order, strict=True)]


@contextlib.contextmanager
def _library_faults(path: Path) -> Iterator[None]:
    """Turn a fault of the library into an error that names ``path``; its panics are no ``Exception``."""
    try:
        yield
    except BaseException as fault:
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        what = " ".join(str(fault).split())[:120]
        raise CheckpointError(f"not a sound tokenizer.json: {what}", path, "fetch it again") from None

"""Agreement of a vocabulary with the other files of its directory, and what they add to it.

A fact that several files hold is read from all of them. Where they differ, rows could have other ids than those that
the model was trained on, so that is refused with both values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.tokenizers.added_tokens import CONFIG, AddedToken, TokenizerFiles, listed, model_ids, vocabulary_of
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE

_PADDING = re.compile(r"\W*pad(_token)?\W*", re.IGNORECASE)
_REMEDY = "use a model whose files agree"


@dataclass(frozen=True)
class Additions:
    """What the files beside a ``tokenizer.model`` add to it.

    ``tokens`` have ids beyond its own. ``legacy``: text after an added token gets a dummy prefix, as at the beginning.
    """

    tokens: tuple[AddedToken, ...]
    bos_id: int | None
    eos_id: int
    legacy: bool = True

    def change(self, bos_id: int | None, eos_id: int) -> bool:
        """Whether they differ from a model of this BOS and EOS alone."""
        return bool(self.tokens) or (self.bos_id, self.eos_id) != (bos_id, eos_id)


def read_additions(path: Path, pieces: Sequence[str], bos_id: int, eos_id: int, on_event: OnEvent) -> Additions:
    """Compare a ``tokenizer.model`` with the files beside it; one of another name stands alone.

    A padding token that only they have, such as ``<pad>``, is left out with a notice: no row contains it, since batches
    have no padding.

    Raises:
        CheckpointError: a token under two ids, or an id with two tokens, or a token without an id; another BOS or EOS
            than the model's; ``add_eos_token`` true; a malformed file.
    """
    if path.name != SENTENCEPIECE_FILE:
        return Additions((), bos_id, eos_id)
    files, known = TokenizerFiles(path.parent), {piece: number for number, piece in enumerate(pieces)}
    added = added_beyond(files, known, SENTENCEPIECE_FILE, on_event)
    _compare_vocabulary(files, pieces, known)
    ids = known | {token.text: token.id for token in added if token.id is not None}
    bos = _role_id(files, "bos_token", ids, bos_id, pieces)
    eos = _role_id(files, "eos_token", ids, eos_id, pieces)
    texts = {token_id: text for text, token_id in ids.items()}
    puts_bos = files.puts("add_bos_token") is not False
    if puts_bos:
        check_model_id(path.parent, "bos_token_id", bos, texts[bos], SENTENCEPIECE_FILE)
    check_model_id(path.parent, "eos_token_id", eos, texts[eos], SENTENCEPIECE_FILE)
    refuse_eos_after_text(files)
    around = added_around(files.facts[JSON_FILE])
    if around is not None and around != ([texts[bos]] if puts_bos else []):
        what = f"{path.parent / JSON_FILE}: its post_processor adds other tokens to a text than are added here"
        on_event(Notice(what, "warning"))
    legacy = files.facts[CONFIG].get("legacy") is not False
    return Additions(tuple(added), bos if puts_bos else None, eos, legacy)


def added_beyond(
    files: TokenizerFiles, known: Mapping[str, int], vocabulary: str, on_event: OnEvent
) -> list[AddedToken]:
    """The tokens of ``files`` that ``known`` lacks, by id. ``vocabulary`` is the name of the file that ``known`` is of.

    A token is special if one file says so.
    """
    taken, found = {token_id: text for text, token_id in known.items()}, dict[str, AddedToken]()
    other: dict[str, AddedToken] = {}
    specials = {token.text for token in files.tokens if token.special}
    for token in files.tokens:
        earlier = found.get(token.text)
        own = known.get(token.text, None if earlier is None else earlier.id)
        fits = own in (None, token.id) and (token.id is None or taken.get(token.id, token.text) == token.text)
        if token.id is not None and not fits:
            other.setdefault(token.text, token)
        elif token.text not in known and (earlier is None or earlier.id is None):
            found[token.text] = dataclasses.replace(token, special=True) if token.text in specials else token
            if token.id is not None:
                taken[token.id] = token.text
    ends = files.role("eos_token")
    for text in [text for text in found if _PADDING.fullmatch(text) and (ends is None or text != ends[0])]:
        token = found.pop(text)
        shown = listed([(text, token.id)])
        on_event(Notice(f"{token.file}: {shown} is not in {vocabulary}; no row will contain it"))
    other |= {text: token for text, token in found.items() if token.id is None}
    if other:
        first = next(iter(other.values()))
        shown = listed((text, token.id) for text, token in other.items() if token.file == first.file)
        what = f"tokens that {vocabulary} does not have, or has under other ids: {shown}"
        raise CheckpointError(what, first.file, _REMEDY)
    return sorted(found.values(), key=lambda token: token.id or 0)


def check_model_id(directory: Path, key: str, token_id: int, text: str, vocabulary: str) -> None:
    """Compare BOS or EOS with the ids in the model's files, which may be several."""
    for file, ids in model_ids(directory, key).items():
        if token_id not in ids:
            shown = ", ".join(map(str, ids[:5]))
            what = f"{key} is {shown}, but that of {vocabulary} is {token_id} ({text[:40]!r})"
            raise CheckpointError(what, file, "use the model's own tokenizer, or correct the id")


def refuse_eos_after_text(files: TokenizerFiles) -> None:
    """Raise ``CheckpointError`` for ``add_eos_token``: a prompt with an EOS after it would not be continued."""
    if files.puts("add_eos_token"):
        what = "add_eos_token is true, but EOS is never put after a prompt"
        raise CheckpointError(what, files.directory / CONFIG, "use a model with add_eos_token false")


def added_around(facts: dict[str, Any]) -> list[str] | None:
    """The special tokens that ``tokenizer.json`` puts around one text; None: it does not say."""
    processor = facts.get("post_processor")
    if not isinstance(processor, dict):
        return None
    parts = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    try:
        templates = [part["single"] for part in parts or [] if part["type"] == "TemplateProcessing"]
        if not templates:
            return None
        return [part["SpecialToken"]["id"] for template in templates for part in template if "SpecialToken" in part]
    except (LookupError, TypeError):
        return ["malformed"]


def _compare_vocabulary(files: TokenizerFiles, pieces: Sequence[str], known: Mapping[str, int]) -> None:
    """The vocabulary in ``tokenizer.json`` must be that of ``tokenizer.model``, if it has one."""
    file, facts = files.directory / JSON_FILE, files.facts[JSON_FILE]
    try:
        vocabulary = dict(vocabulary_of(facts))
        if not all(type(text) is str and type(token_id) is int for text, token_id in vocabulary.items()):
            raise TypeError
    except (AttributeError, LookupError, TypeError, ValueError):
        raise CheckpointError("malformed: its tokens cannot be read", file, "fetch it again") from None
    unknown = {text: token_id for text, token_id in vocabulary.items() if known.get(text) != token_id}
    if unknown:
        what = f"tokens that tokenizer.model does not have: {listed(unknown.items())}"
        raise CheckpointError(what, file, _REMEDY)
    added = {token.text for token in files.tokens if token.file == file}
    lost = [(text, known[text]) for text in pieces if text not in vocabulary and text not in added]
    if vocabulary and lost:
        raise CheckpointError(f"lacks tokens of tokenizer.model: {listed(lost)}", file, _REMEDY)


def _role_id(files: TokenizerFiles, role: str, ids: Mapping[str, int], own: int, pieces: Sequence[str]) -> int:
    """BOS or EOS: the one that is named, if it was added to the model or the model's configuration names it too."""
    named = files.role(role)
    if named is None or ids.get(named[0], own) == own:
        return own
    text, file = named
    confirmed = [ids[text] in stated for stated in model_ids(files.directory, f"{role}_id").values()]
    if ids[text] < len(pieces) and not (confirmed and all(confirmed)):
        what = f"{role} is {text!r}, but that of tokenizer.model is {pieces[own]!r}"
        raise CheckpointError(what, file, _REMEDY)
    return ids[text]

"""llama.cpp's names for the ways in which byte-level tokenizers split a text before BPE (``tokenizer.ggml.pre``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.tokenizers.json_definition import parts_of
from llamatune.tokenizers.tiktoken_file import PATTERN as LLAMA_3

_QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is split: by ``pattern``, or as GPT-2 does. ``digits``: each one alone before that.

    ``composes``: the text is put into normal form C before. ``whole_words``: a part of the text that is a token is not
    split again, whatever the merges say. ``adds_bos``: a BOS is put before a text if the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    composes: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    def parts(self) -> list[dict[str, Any]]:
        """The parts of ``pre_tokenizer`` in a ``tokenizer.json``."""
        found: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        if self.pattern is not None:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            found.append(split)
        regex = self.pattern is None
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": regex}
        return [*found, byte_level]


PRE_TOKENIZERS = {
    "llama-bpe": PreTokenizer(LLAMA_3, whole_words=True, adds_bos=True),
    "qwen2": PreTokenizer(_QWEN_2, composes=True),
    "smollm": PreTokenizer(digits=True),
    "gpt-2": PreTokenizer(),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True, adds_bos=True),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def pre_tokenizer_called(name: object, path: Path) -> PreTokenizer:
    """The one that a file names; ``CheckpointError`` for one that is not known."""
    found = PRE_TOKENIZERS.get(_ALIASES.get(str(name), str(name)))
    if found is None:
        what = f"tokenizer.ggml.pre is {str(name)[:40]!r}, a way to split text that is not known here"
        raise CheckpointError(what, path, f"known are {', '.join(PRE_TOKENIZERS)}")
    return found


def pre_tokenizer_name(definition: dict[str, Any], path: Path, on_event: OnEvent) -> str:
    """llama.cpp's name for what a checked ``tokenizer.json`` does.

    Raises:
        CheckpointError: it has none: the text would be split in another way.
    """
    todo = f"choose --format hf; known are the tokenizers called {', '.join(PRE_TOKENIZERS)} in llama.cpp"
    model = definition["model"]
    if not isinstance(model["vocab"], dict) or model.get("byte_fallback") or model.get("unk_token"):
        what = "its model is no byte-level BPE, which is what a GGUF file holds of a tokenizer.json"
        raise CheckpointError(what, path, "put the model's tokenizer.model beside it")
    normalizers = [kind for kind, _ in parts_of(definition, "normalizer")]
    split = [_essence(kind, part) for kind, part in parts_of(definition, "pre_tokenizer")]
    for name, known in PRE_TOKENIZERS.items():
        if split == [_essence(part["type"], part) for part in known.parts()]:
            if normalizers != (["NFC"] if known.composes else []):
                what = f"its normalizer is {' and '.join(normalizers) or 'none'}, which is lost in a GGUF file"
                raise CheckpointError(what, path, todo)
            if bool(model.get("ignore_merges")) != known.whole_words:
                what = "ignore_merges is not what llama.cpp takes for this kind of tokenizer, so rare words may differ"
                on_event(Notice(f"{path}: {what}", "warning"))
            return name
    raise CheckpointError("llama.cpp has no name for the way in which its pre_tokenizer splits text", path, todo)


def _essence(kind: str, part: dict[str, Any]) -> tuple[Any, ...]:
    """What of a part determines ids."""
    match kind:
        case "Split":
            pattern = part["pattern"].get("Regex")
            return kind, pattern, str(part.get("behavior")).lower(), bool(part.get("invert"))
        case "Digits":
            return kind, bool(part.get("individual_digits"))
        case "ByteLevel":
            return kind, bool(part.get("add_prefix_space")), part.get("use_regex", True) is not False
    return kind, repr(part)

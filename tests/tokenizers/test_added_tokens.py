"""Tokens that were added beside a SentencePiece model: in the ids of transformers 4, which asks SentencePiece too."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hard_texts import HARD_TEXTS, random_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.safe_reading import digest_file
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

CHATML = {"<|im_start|>": 512, "<|im_end|>": 513}
WORDS = {"<tool>": 514, "zebra": 515}
SNIPPETS = st.lists(st.sampled_from(["a", " ", "é", "🦙", "<tool>", "zebra", "<|im_end|>", "the ", "\n"])).map("".join)
Beside = Callable[..., Path]


def _decoder(**flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    tokens = {str(i): {"content": text, **plain, "special": True} for text, i in CHATML.items()}
    return tokens | {str(i): {"content": text, **plain, "special": False, **flags} for text, i in WORDS.items()}


@pytest.fixture
def beside(tokenizer_models: dict[str, Path], tmp_path: Path) -> Beside:
    def make(name: str = "model", **files: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        shutil.copy(tokenizer_models["bpe"], directory / "tokenizer.model")
        for file, content in files.items():
            (directory / f"{file}.json").write_text(json.dumps(content))
        return directory

    return make


def by_hand(model: Path, text: str, legacy: bool) -> list[int]:
    """Cut the text at the added words, and let SentencePiece encode what is between: the rule of transformers 4."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids, rest, first = [processor.bos_id()], text, True
    while rest:
        found = min(((rest.find(word), word) for word in WORDS if word in rest), default=(len(rest), ""))
        part, rest = rest[: found[0]], rest[found[0] + len(found[1]) :]
        if part and (legacy or first):
            ids += processor.encode(part)
        elif part:  # behind a line break SentencePiece adds no space of its own
            ids += processor.encode("\n" + part)[len(processor.encode("\n")) :]
        elif first and not legacy:
            ids.append(processor.piece_to_id("▁"))
        ids += [WORDS[found[1]]] if found[1] else []
        first = False
    return ids


@pytest.mark.parametrize("legacy", [True, False])
def test_words_are_found_in_text_and_special_tokens_are_not(beside: Beside, legacy: bool) -> None:
    config = {"legacy": legacy, "added_tokens_decoder": _decoder(), "eos_token": "<|im_end|>"}
    directory = beside(tokenizer_config=config)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (516, 1, 513)
    assert tokenizer.special_ids == {"<s>": 1, "</s>": 2, **CHATML}
    own = ["x<tool> y", "<tool>  z", "q<tool>\nzebra zebra", "<tool><tool>", "a zebra's", "<|im_end|><tool>"]
    for text in own + HARD_TEXTS + random_texts(200):
        ids = tokenizer.encode(text)
        assert ids == by_hand(directory / "tokenizer.model", text, legacy), text
        assert not set(CHATML.values()) & set(ids)
        assert ids == [1, *tokenizer.encode_with_offsets(text)[0]]
    for text in own:
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
    stream = pickle.loads(pickle.dumps(tokenizer))
    assert stream.decode([1, *tokenizer.encode("a b")[1:], 513]) == "a b"
    assert stream.fingerprint == tokenizer.fingerprint


@given(text=SNIPPETS, boundary=st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_the_boundary_with_added_words(chatml: Tokenizer, text: str, boundary: int) -> None:
    boundary = min(boundary, len(text))
    ids, first = chatml.encode_pair(text[:boundary], text[boundary:])
    assert ids == chatml.encode(text)
    _, offsets = chatml.encode_with_offsets(text)
    assert [end for _, end in offsets] == sorted(end for _, end in offsets)
    for index, (begin, end) in enumerate(offsets, 1):
        if 0 < boundary < len(text) and begin < end:
            assert (index >= first) == (end > boundary)


@pytest.fixture(scope="module")
def chatml(tokenizer_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("chatml")
    shutil.copy(tokenizer_models["bpe"], directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": _decoder()}))
    return load_tokenizer(directory)


def test_flags_of_a_word_are_obeyed(beside: Beside) -> None:
    def ids(text: str, **flags: bool) -> list[int]:
        return load_tokenizer(beside(tokenizer_config={"added_tokens_decoder": _decoder(**flags)})).encode(text)[1:]

    assert ids("a  zebra  b", lstrip=True, rstrip=True) == [*ids("a"), 515, *ids("b")]
    assert 515 not in ids("zebras", single_word=True)
    assert 515 in ids("zebras")


@pytest.mark.parametrize(
    ("files", "bos", "eos", "size"),
    [
        ({"added_tokens": CHATML}, 1, 2, 514),
        ({"added_tokens": CHATML, "tokenizer_config": {"eos_token": "<|im_end|>"}}, 1, 513, 514),
        ({"added_tokens": CHATML, "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}},
          "config": {"eos_token_id": [2, 513]}}, 1, 513, 514),
        ({"added_tokens": {"<pad>": 512, "<|e|>": 513}, "tokenizer_config": {"eos_token": "<|e|>"}}, 1, 513, 514),
        ({"added_tokens": {"<pad>": 512}, "tokenizer_config": {"eos_token": "<pad>"}}, 1, 512, 513),
        ({"tokenizer": {"added_tokens": [{"id": 512, "content": "<|im_end|>", "special": True}]},
          "tokenizer_config": {"add_bos_token": False}}, None, 2, 513),
        ({"tokenizer_config": {"eos_token": "<unk>"}, "config": {"eos_token_id": 0}}, 1, 0, 512),
    ],
)  # fmt: skip
def test_bos_eos_and_size_are_read_from_all_files(
    beside: Beside, files: dict[str, Any], bos: int | None, eos: int, size: int
) -> None:
    tokenizer = load_tokenizer(beside(**files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (bos, eos, size)
    assert tokenizer.encode("") == ([] if bos is None else [bos])


def test_the_fingerprint_is_the_files_own_unless_more_determines_ids(beside: Beside) -> None:
    """Rows that were prepared before stay those of their tokenizer."""
    alone = beside("alone", tokenizer_config={"add_bos_token": True}, added_tokens={"<pad>": 512})
    own = f"sha256:{digest_file(alone / 'tokenizer.model')}"
    assert load_tokenizer(alone).fingerprint == own
    several = [
        load_tokenizer(beside(f"m{number}", **files)).fingerprint
        for number, files in enumerate([
            {"added_tokens": CHATML},
            {"added_tokens": {**CHATML, "<|x|>": 514}},
            {"added_tokens": CHATML, "tokenizer_config": {"eos_token": "<|im_end|>"}},
            {"tokenizer_config": {"add_bos_token": False}},
        ])
    ]  # fmt: skip
    assert len({own, *several}) == 5


@pytest.mark.parametrize("legacy", [True, False])
def test_special_tokens_between_texts(tokenizer_models: dict[str, Path], tmp_path: Path, legacy: bool) -> None:
    """After BOS a text begins anew; after an added token only if the files are legacy. White space may be a token's."""
    shutil.copy(tokenizer_models["bpe"], tmp_path / "tokenizer.model")
    size = load_tokenizer(tmp_path).vocab_size
    flags = {"special": True, "lstrip": False, "rstrip": False}
    added = {
        str(size): {**flags, "content": "<|im_end|>"},
        str(size + 1): {**flags, "content": "<|end|>", "lstrip": True, "rstrip": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "legacy": legacy}))
    made = load_tokenizer(tmp_path)
    parts = [
        ("<s>", 1),
        ("seven ", None),
        ("hills", None),
        ("<|im_end|>", size),
        ("stone", None),
        ("</s>", 2),
        ("rain", None),
    ]
    ids, offsets = made.encode_mixed(parts)
    text = "".join(part for part, _ in parts)
    plain = made._processor.encode  # with a dummy prefix
    later = plain("stone") if legacy else made._later.encode("stone")
    assert ids == [1, *plain("seven hills"), size, *later, 2, *plain("rain")]
    assert legacy == (later == plain("stone"))
    assert "".join(text[begin:end] for begin, end in offsets) == text
    ids, offsets = made.encode_mixed([("rain  ", None), ("<|end|>", size + 1), ("  falls", None)])
    assert [token for token in ids if token == size + 1] == [size + 1]
    assert ids == made.encode_mixed([("rain", None), ("<|end|>", size + 1), ("falls", None)])[0]
    assert offsets[-1][1] == len("rain  <|end|>  falls")
    assert made.encode_mixed([]) == ([], [])

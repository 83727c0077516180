"""Tokenizers of a ``tokenizer.json`` against transformers and against the bytes that their tokens spell."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hard_texts import HARD_TEXTS, random_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llamatune.errors import CheckpointError, DataError
from llamatune.events import Notice
from llamatune.tokenizers.byte_level import bytes_of
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import TextStream, Tokenizer, check_vocabulary

KINDS = ("llama_3", "smollm", "unigram", "llama_2")
BYTE_LEVEL = ("llama_3", "smollm")
SNIPPETS = st.text(alphabet=st.sampled_from(list("ab in:.?1 \n\té日🦙각\u2028")))
Change = Callable[..., Path]


@pytest.fixture
def changed(json_tokenizers: dict[str, Path], tmp_path: Path) -> Change:
    """A copy of a tokenizer's directory whose JSON files were changed: ``change(tokenizer, config)``."""

    def make(kind: str, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
        directory = tmp_path / "tokenizer"
        shutil.copytree(json_tokenizers[kind], directory, dirs_exist_ok=True)
        files = [directory / "tokenizer.json", directory / "tokenizer_config.json"]
        facts = [json.loads(file.read_text()) for file in files]
        change(*facts)
        for file, content in zip(files, facts, strict=True):
            file.write_text(json.dumps(content))
        return directory

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(json_tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(json_tokenizers[kind])
    judge = PreTrainedTokenizerFast.from_pretrained(json_tokenizers[kind])
    assert tokenizer.vocab_size == len(judge)
    assert tokenizer.eos_id == judge.eos_token_id
    for text in HARD_TEXTS + random_texts(300):
        ids = tokenizer.encode(text)
        if kind != "unigram" or "</s>" not in text:  # transformers makes the special token of it
            assert ids == judge.encode(text, split_special_tokens=True), text
        own = ids[len(tokenizer.beginning) :]
        assert {tokenizer.special_ids.get("<unk>")}.issuperset(set(own) & set(tokenizer.special_ids.values())), text
        if kind == "llama_3":
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=SNIPPETS, prompt=st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_a_token_is_the_completions_iff_it_holds_a_character_of_it(
    json_tokenizers: dict[str, Path], kind: str, text: str, prompt: int
) -> None:
    tokenizer, boundary = _loaded(json_tokenizers[kind]), min(prompt, len(text))
    ids, first = tokenizer.encode_pair(text[:boundary], text[boundary:])
    assert ids == tokenizer.encode(text)
    character_of = [n for n, c in enumerate(text) for _ in c.encode()]
    at = 0
    for index, token_id in enumerate(ids[len(tokenizer.beginning) :], len(tokenizer.beginning)):
        width = len(bytes_of(tokenizer._library.id_to_token(token_id)))  # type: ignore[attr-defined]
        held = character_of[at : at + width]
        assert (index >= first) == (max(held) >= boundary)
        at += width
    assert at == len(character_of)


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_cover_the_text_in_order(json_tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(json_tokenizers[kind])
    for text in HARD_TEXTS:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert len(ids) == len(offsets)
        ends = [end for _, end in offsets]
        assert ends == sorted(ends)
        assert not ends or ends[-1] == len(text)


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece"])
def test_a_stream_gives_whole_characters_and_in_the_end_all(
    json_tokenizers: dict[str, Path], tokenizer: Tokenizer, kind: str
) -> None:
    own = tokenizer if kind == "sentencepiece" else load_tokenizer(json_tokenizers[kind])
    for text in HARD_TEXTS + random_texts(200, 3):
        ids = own.encode(text)
        for cut in (len(own.beginning), len(ids) // 2):
            prompt, rest = ids[:cut], ids[cut:]
            whole, before = own.decode(ids), own.decode(prompt)
            stream = TextStream(own, prompt)
            parts = [stream.push(token_id) for token_id in rest]
            if "\ufffd" not in text and whole.startswith(before):
                assert not any("\ufffd" in part for part in parts), text
                assert "".join(parts) + stream.finish() == whole[len(before) :], text
    emoji = own.encode("a🦙")
    assert own.continuation(emoji[:-1], []) == ""
    assert TextStream(own, []).finish() == ""
    unfinished = TextStream(own, own.encode("a"))
    if kind in BYTE_LEVEL:
        assert [unfinished.push(i) for i in own.encode("🦙")[len(own.beginning) : -1]] == ["", "", ""]
        assert unfinished.finish() == "\ufffd"


def test_beginning_and_end(json_tokenizers: dict[str, Path]) -> None:
    found = {kind: load_tokenizer(json_tokenizers[kind]) for kind in KINDS}
    assert {kind: tokenizer.bos_id is None for kind, tokenizer in found.items()} == {
        "llama_3": False, "smollm": True, "unigram": True, "llama_2": False,
    }  # fmt: skip
    assert found["llama_3"].special_ids["<|eot_id|>"] == found["llama_3"].eos_id
    assert found["smollm"].encode("") == []
    assert found["smollm"].encode_pair("", "a")[1] == 0
    assert found["llama_3"].encode("x<tool>y").count(found["llama_3"].pieces().index("<tool>")) == 1


@pytest.mark.parametrize("kind", ["llama_3", "smollm"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_the_post_processor_decides_on_bos_whatever_the_flag(changed: Change, kind: str, flag: bool | None) -> None:
    """As in transformers 5."""
    directory = changed(kind, lambda _, config: config.update({} if flag is None else {"add_bos_token": flag}))
    told: list[Any] = []
    tokenizer = load_tokenizer(directory, told.append)
    assert (tokenizer.bos_id is not None) is (kind == "llama_3")
    assert ["decides" in event.message for event in told] == [True] * (flag not in (None, kind == "llama_3"))
    judge = PreTrainedTokenizerFast.from_pretrained(directory)
    assert tokenizer.encode("a red llama") == judge.encode("a red llama")


def test_marks_that_normalising_joins_belong_to_the_token_of_their_character(json_tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(json_tokenizers["smollm"])
    for prompt, completion in (("e", "\u0301"), ("e", "\u0301 x"), ("x\u1100", "\u1161\u11a8 y")):
        ids, first = tokenizer.encode_pair(prompt, completion)
        before = tokenizer.encode(prompt[:-1])
        assert ids[: len(before)] == before
        assert first == len(before)


def test_eos_comes_from_the_model_where_the_tokenizer_names_none(changed: Change) -> None:
    directory = changed("llama_3", lambda _, config: config.pop("eos_token"))
    with pytest.raises(CheckpointError, match="no file names its EOS"):
        load_tokenizer(directory)
    size = load_tokenizer(changed("llama_3", lambda *_: None)).vocab_size
    changed("llama_3", lambda _, config: config.pop("eos_token"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [size - 2, 3]}))
    assert load_tokenizer(directory).piece(size - 2) == "<|eot_id|>"
    assert load_tokenizer(directory).eos_id == size - 2


def test_tokens_that_only_other_files_have_are_added(changed: Change) -> None:
    directory = changed("llama_3", lambda _, config: config.update(eos_token="<|im_end|>"))
    size = len(PreTrainedTokenizerFast.from_pretrained(directory)) - 1
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1)
    assert size not in tokenizer.encode("<|im_end|>")
    with pytest.raises(CheckpointError, match=rf"tokenizer id {size} >= {size} embedding rows"):
        check_vocabulary(tokenizer, size, directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 5}))
    with pytest.raises(CheckpointError, match=r"leave a gap: '<\|im_end\|>'"):
        load_tokenizer(directory)


def _model(**change: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda facts, _: facts["model"].update(change)


def _top(**change: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda facts, _: facts.update(change)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


REFUSED = {
    "WordLevel": (_model(type="WordLevel"), "kind 'WordLevel', only BPE and Unigram"),
    "dropout": (_model(dropout=0.1), "dropout"),
    "prefix of words": (_model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "an id twice": (_model(vocab={"a": 0, "b": 0}), "a token or an id twice"),
    "an id beyond reason": (_model(vocab={"a": 1 << 40}), "a token or an id twice, or one that cannot be read"),
    "a merge of nothing": (_model(merges=[["a", "no such token"]]), "not a sound tokenizer.json: .*out of vocabulary"),
    "merges of numbers": (_model(merges=[[1, 2]]), "merges cannot be read"),
    "merges of three": (_model(merges=["a b c"]), "not a sound tokenizer.json: Merges"),
    "another normaliser": (_top(normalizer={"type": "BertNormalizer"}), "normalizer is of kind 'BertNormalizer'"),
    "another pre-tokenizer": (_top(pre_tokenizer={"type": "BertPreTokenizer"}), "pre_tokenizer is of kind"),
    "another decoder": (_top(decoder={"type": "CTC"}), "decoder is of kind 'CTC'"),
    "another processor": (_top(post_processor={"type": "BertProcessing"}), "post_processor is of kind"),
    "no decoder": (_top(decoder=None), "has no decoder"),
    "exponential time": (_top(pre_tokenizer=_split("(a+)+$")), "a repeat within a repeat"),
    "exponential memory": (
        _top(normalizer={"type": "Sequence", "normalizers": [_replace("aaaa")] * 4}), "makes a text 256 times as long",
    ),
    "a text of a megabyte": (_top(normalizer=_replace("b" * (1 << 20))), "of 1048576 characters"),
    "endless parts": (_top(normalizer={"type": "Sequence", "normalizers": [_replace("a")] * 99}), "cannot be read"),
    "EOS after a text": (
        lambda facts, _: facts["post_processor"]["single"].append({"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}}),
        "post_processor puts .* around a text",
    ),
    "BOS under another id": (
        lambda facts, _: facts["post_processor"]["special_tokens"]["<|begin_of_text|>"].update(ids=[5]),
        r"gives '<\|begin_of_text\|>' the ids \[5\], its vocabulary 50",
    ),
    "EOS that it lacks": (lambda _, config: config.update(eos_token="<|nothing|>"), r"'<\|nothing\|>' \(no id\)"),
    "a token under two ids": (
        lambda _, config: config.update(added_tokens_decoder={"7": {"content": "<|eot_id|>"}}), r"'<\|eot_id\|>' \(7\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(changed: Change, case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(changed("llama_3", change))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_what_determines_ids(changed: Change, json_tokenizers: dict[str, Path]) -> None:
    own = load_tokenizer(json_tokenizers["llama_3"]).fingerprint
    spelling = changed(
        "llama_3", lambda facts, _: facts["model"].update(merges=[*map(" ".join, facts["model"]["merges"])])
    )
    assert load_tokenizer(spelling).fingerprint == own
    assert load_tokenizer(changed("llama_3", lambda facts, _: facts["model"]["merges"].pop())).fingerprint != own
    assert load_tokenizer(changed("llama_3", lambda _, c: c.update(eos_token="<|end_of_text|>"))).fingerprint != own
    assert load_tokenizer(changed("llama_3", lambda facts, _: facts.update(post_processor=None))).fingerprint != own


def test_bytes_without_a_token_are_told(changed: Change) -> None:
    def drop(facts: dict[str, Any], _: object) -> None:
        vocabulary = facts["model"]["vocab"]
        vocabulary["unused"] = vocabulary.pop("ð")  # the first byte of every emoji

    told: list[Any] = []
    load_tokenizer(changed("llama_3", drop), told.append)
    assert [event.message.split(": ")[1] for event in told if isinstance(event, Notice)] == [
        "1 bytes have no token, so characters with them are left out"
    ]


def test_a_pickle_a_surrogate_and_pieces(json_tokenizers: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(json_tokenizers["llama_3"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(" é <tool>") == tokenizer.encode(" é <tool>")
    assert copy.fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    shown = [tokenizer.piece(i) for i in tokenizer.encode("the 🦙")]
    assert shown[0] == "<|begin_of_text|>"
    assert "".join(shown[1:]) == "the▁<0xF0><0x9F><0xA6><0x99>"
    ids = [*tokenizer.encode("a"), tokenizer.eos_id, tokenizer.vocab_size, 1 << 20, -1]
    assert tokenizer.decode(ids) == "a"


_tokenizers: dict[Path, Tokenizer] = {}


def _loaded(path: Path) -> Tokenizer:
    return _tokenizers.setdefault(path, load_tokenizer(path)) if path not in _tokenizers else _tokenizers[path]

"""Tokenizers through a GGUF file's metadata and back: the same ids of every hard text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hard_texts import HARD_TEXTS, random_texts

from llamatune.errors import CheckpointError
from llamatune.events import Notice
from llamatune.tokenizers.chat_templates import read_chat_templates
from llamatune.tokenizers.gguf_pre_tokenizers import PRE_TOKENIZERS
from llamatune.tokenizers.gguf_rebuilt import write_tokenizer
from llamatune.tokenizers.gguf_vocabulary import vocabulary_entries
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.sentencepiece_proto import CONTROL, UNUSED, USER_DEFINED, read_pieces, written_pieces

TEXTS = [*HARD_TEXTS, *random_texts(150)]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def metadata_of(directory, rows=700, ends=(), told=None):
    entries = vocabulary_entries(directory, rows, ends, (told if told is not None else []).append)
    return {key: value for key, (_, value) in entries.items()}


def rebuilt(directory, tmp_path, **options):
    made = tmp_path / "rebuilt"
    made.mkdir()
    facts = metadata_of(directory, **options)
    write_tokenizer(facts, made, tmp_path / "model.gguf")
    return load_tokenizer(made), made, facts


def assert_same(one, other):
    assert (one.bos_id, one.eos_id, one.special_ids) == (other.bos_id, other.eos_id, other.special_ids)
    for text in TEXTS:
        assert one.encode(text) == other.encode(text), text
        assert one.decode(one.encode(text)) == other.decode(one.encode(text)), text


@pytest.fixture
def directory(kinds_of_json, tmp_path):
    """A copy of one of them, to be changed."""

    def make(name):
        return Path(shutil.copytree(kinds_of_json(name), tmp_path / name))

    return make


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_come_back(directory, tmp_path, name):
    source = directory(name)
    after, _, facts = rebuilt(source, tmp_path)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert len(facts["tokenizer.ggml.tokens"]) == 700
    assert facts["tokenizer.ggml.add_bos_token"] == PRE_TOKENIZERS[name].adds_bos
    assert_same(load_tokenizer(source), after)


def test_special_tokens_at_the_beginning_of_the_vocabulary_come_back(json_tokenizers, tmp_path):
    source = tmp_path / "smollm"
    shutil.copytree(json_tokenizers["smollm"], source)
    facts = json.loads((source / "tokenizer.json").read_text())
    facts["normalizer"] = None
    facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["smollm"].parts()}
    (source / "tokenizer.json").write_text(json.dumps(facts))
    after, _, metadata = rebuilt(source, tmp_path)
    assert metadata["tokenizer.ggml.token_type"][:4] == [CONTROL] * 3 + [1]
    assert_same(load_tokenizer(source), after)


@pytest.mark.parametrize("added", [False, True])
def test_sentencepiece_comes_back(tokenizer_models, tmp_path, added):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(tokenizer_models["bpe"], source / "tokenizer.model")
    size = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).vocab_size()
    if added:
        tokens = {str(size): {"content": "<|im_start|>", "special": True}, str(size + 1): {"content": "<word>"}}
        (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    after, made, facts = rebuilt(source, tmp_path)
    before = load_tokenizer(source)
    assert (before.bos_id, before.eos_id) == (after.bos_id, after.eos_id)
    assert before.special_ids.items() <= after.special_ids.items()
    for text in HARD_TEXTS if not added else ["a <|im_start|> b", " plain text", "the <word> is"]:
        assert before.encode(text) == after.encode(text), text
    kinds = facts["tokenizer.ggml.token_type"][size : size + 3]
    assert kinds == ([CONTROL, USER_DEFINED, UNUSED] if added else [UNUSED] * 3)
    assert after.vocab_size == before.vocab_size, "the rows that only fill the embedding are left out"
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"


def test_normalisation_comes_back_and_is_told(tiny_tokenizer, tmp_path):
    source, told = tmp_path / "source", []
    source.mkdir()
    shutil.copy(tiny_tokenizer, source / "tokenizer.model")
    after, _, _ = rebuilt(source, tmp_path, told=told)
    assert any("llama.cpp does not do it" in event.message for event in told if isinstance(event, Notice))
    before = load_tokenizer(source)
    for text in HARD_TEXTS:
        assert before.encode(text) == after.encode(text), text


def test_the_bytes_of_a_model_are_read_and_written_as_the_library_does(tokenizer_models):
    for name in ("bpe", "normalising"):
        model = tokenizer_models[name].read_bytes()
        facts = read_pieces(model)
        ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (written_pieces(facts), model))
        assert read_pieces(written_pieces(facts)) == facts
        assert [p.score for p in facts.pieces] == [theirs.get_score(i) for i in range(theirs.vocab_size())]
        for text in HARD_TEXTS:
            assert ours.encode(text) == theirs.encode(text), (name, text)
        for role in ("bos_id", "eos_id", "unk_id", "pad_id"):
            assert getattr(ours, role)() == getattr(theirs, role)()


def test_a_damaged_message_is_named_and_ends(tokenizer_models):
    model = tokenizer_models["bpe"].read_bytes()
    for damaged in (
        model[:-1],
        model + b"\x0b",
        model + b"\x0a\x7f",
        model + b"\xff" * 1000,
        model + b"\x0a\x02\x12\x00\x01",
    ):
        with pytest.raises(ValueError, match=r"cut off|no number|of the unknown kind"):
            read_pieces(damaged)
    with pytest.raises(ValueError, match="score of piece"):
        read_pieces(b"\x0a\x04\x12\x02ab")


def test_chat_templates_and_ends_of_a_text_come_back(directory, tmp_path):
    source = directory("llama-bpe")
    config = json.loads((source / "tokenizer_config.json").read_text())
    ids = load_tokenizer(source).special_ids
    config["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "t"}]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    _, made, facts = rebuilt(source, tmp_path, ends=(ids["<|end_of_text|>"], ids["<|eot_id|>"]))
    assert facts["tokenizer.chat_template"] == TEMPLATE
    assert facts["tokenizer.ggml.eos_token_id"] == ids["<|eot_id|>"]
    assert facts["tokenizer.ggml.eot_token_id"] == ids["<|end_of_text|>"]
    found = {name: text for name, (text, _) in read_chat_templates(made).items()}
    assert found == {"default": TEMPLATE, "tools": "t"}
    assert not (made / "chat_template.jinja").exists(), "transformers would forget the other one"
    del config["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (tmp_path / "single").mkdir()
    write_tokenizer(metadata_of(source), tmp_path / "single", tmp_path / "model.gguf")
    assert (tmp_path / "single" / "chat_template.jinja").read_text() == TEMPLATE
    assert {name: text for name, (text, _) in read_chat_templates(tmp_path / "single").items()} == {"default": TEMPLATE}
    (source / "chat_template.jinja").write_text("newer")
    assert read_chat_templates(source)["default"].text == "newer", "a file of its own wins, as in transformers"


def changed(key, value):
    def change(facts):
        facts[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (changed("pre_tokenizer", {"type": "Digits", "individual_digits": False}), "no name for the way"),
        (changed("normalizer", {"type": "Lowercase"}), "its normalizer is Lowercase"),
    ],
)
def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(directory, change, why):
    source = directory("qwen2")
    facts = json.loads((source / "tokenizer.json").read_text())
    change(facts)
    (source / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=why):
        metadata_of(source)


@pytest.mark.parametrize(("kind", "why"), [("llama_2", "no byte-level BPE"), ("unigram", "no byte-level BPE")])
def test_other_kinds_of_tokenizer_json_are_refused(json_tokenizers, kind, why):
    with pytest.raises(CheckpointError, match=why):
        metadata_of(json_tokenizers[kind])


@pytest.mark.parametrize(("name", "why"), [("unigram", "a Unigram model"), ("suffix", "spaces are suffixes")])
def test_other_kinds_of_sentencepiece_are_refused(tokenizer_models, tmp_path, name, why):
    shutil.copy(tokenizer_models[name], tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=why):
        metadata_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pre": "command-r"}, "'command-r', a way to split text that is not known"),
        ({"model": "bert"}, "'bert'"),
        ({"tokens": "x"}, "malformed"),
        ({"tokens": ["a", "b"]}, "malformed"),
        ({"merges": ["a b c"]}, "malformed"),
        ({"eos_token_id": None}, "no file names its EOS"),
        ({"add_eos_token": True}, "add_eos_token"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(directory, tmp_path, changes, why):
    facts = metadata_of(directory("llama-bpe")) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError, match=why) as fault:
        write_tokenizer(facts, tmp_path / "made", tmp_path / "model.gguf")
    assert "model.gguf" in str(fault.value)


def test_a_model_without_a_tokenizer_has_none(tmp_path):
    told = []
    assert metadata_of(tmp_path, told=told) == {"tokenizer.ggml.model": "none"}
    assert "no tokenizer" in told[0].message
    (tmp_path / "made").mkdir()
    write_tokenizer({"tokenizer.ggml.model": "none"}, tmp_path / "made", tmp_path / "model.gguf")
    assert list((tmp_path / "made").iterdir()) == []

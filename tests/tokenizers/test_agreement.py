"""A ``tokenizer.model`` is believed only as far as the files beside it agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llamatune.errors import CheckpointError
from llamatune.events import Notice
from llamatune.tokenizers.loading import load_tokenizer

Beside = Callable[..., Path]
CHATML = {"<|im_start|>": 512, "<|im_end|>": 513}
PLAIN = {"content": "<s>", "lstrip": False, "normalized": False, "special": True}


@pytest.fixture
def beside(tokenizer_models: dict[str, Path], tmp_path: Path) -> Beside:
    """A directory with a ``tokenizer.model`` of 512 pieces and files of the given content, by the part before .json."""

    def make(**files: Any) -> Path:
        shutil.copy(tokenizer_models["bpe"], tmp_path / "tokenizer.model")
        for name, content in files.items():
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / f"{name}.json").write_bytes(text)
        return tmp_path

    return make


def whole(model: Path, **changes: Any) -> dict[str, Any]:
    """A ``tokenizer.json`` of the same vocabulary."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    specials = [{**PLAIN, "id": i, "content": processor.id_to_piece(i)} for i in range(3)]
    return {"version": "1.0", "added_tokens": specials, "model": {"type": "BPE", "vocab": vocabulary}, **changes}


REFUSED = {
    "an id of a piece": ({"added_tokens": {"<|im_end|>": 511}}, r"'<\|im_end\|>' \(511\): .*added_t"),
    "two ids for a token": (
        {
            "added_tokens": CHATML,
            "tokenizer_config": {"added_tokens_decoder": {"514": {**PLAIN, "content": "<|im_end|>"}}},
        },
        r"under other ids: '<\|im_end\|>' \(514\): .*tokenizer_config",
    ),
    "two tokens for an id": ({"added_tokens": {"<a>": 512, "<b>": 512}}, r"'<b>' \(512\)"),
    "a piece under another id": ({"added_tokens": {"</s>": 600}}, r"'</s>' \(600\)"),
    "a name without an id": (
        {"special_tokens_map": {"additional_special_tokens": ["<s>", {"content": "<|im_end|>"}]}},
        r"'<\|im_end\|>' \(no id\): .*special_tokens_map",
    ),
    "names in an object": ({"tokenizer_config": {"extra_special_tokens": {"image": "<image>"}}}, "'<image>'"),
    "more than are listed": ({"added_tokens": {f"<t{i}>": 12 + i for i in range(7)}}, r"\(16\) and 2 more"),
    "two BOS": (
        {"tokenizer_config": {"bos_token": "<s>"}, "special_tokens_map": {"bos_token": "<unk>"}},
        "bos_token is '<s>', but '<unk>' in special_tokens_map",
    ),
    "another EOS": ({"tokenizer_config": {"eos_token": "<s>"}}, "eos_token is '<s>', but .* '</s>'"),
    "another BOS": ({"special_tokens_map": {"bos_token": {"content": "</s>"}}}, "bos_token is '</s>', but .* '<s>'"),
    "EOS after all": ({"tokenizer_config": {"add_eos_token": True}}, "add_eos_token is true"),
    "a flag in words": ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token is 'false'"),
    "the model's EOS": ({"config": {"eos_token_id": 513}}, r"eos_token_id is 513, but .* 2 \('</s>'\): .*config\.json"),
    "the model's EOS in a list": ({"config": {"eos_token_id": [7, 513]}}, "eos_token_id is 7, 513, but .* 2 "),
    "the EOS of generation": (
        {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 513}},
        "eos_token_id is 513, but .*generation_config",
    ),
    "the model's BOS": ({"config": {"bos_token_id": 0}}, r"bos_token_id is 0, but .* 1 \('<s>'\)"),
    "not JSON": ({"tokenizer": b"version https://git-lfs.github.com/spec/v1"}, "not valid JSON.*tokenizer.json"),
    "no object": ({"added_tokens": []}, "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_the_model_is_refused_by_name(beside: Beside, case: str) -> None:
    files, message = REFUSED[case]
    directory = beside(**files)
    for path in (directory, directory / "tokenizer.model"):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unigram", [False, True])
def test_the_whole_vocabulary_is_compared(beside: Beside, tokenizer_models: dict[str, Path], unigram: bool) -> None:
    def tokenizer_json(vocabulary: dict[str, int]) -> dict[str, Any]:
        given = [[piece, -1.0] for piece in vocabulary] if unigram else vocabulary
        return {**whole(tokenizer_models["bpe"]), "model": {"vocab": given}}

    vocabulary = whole(tokenizer_models["bpe"])["model"]["vocab"]
    assert load_tokenizer(beside(tokenizer=tokenizer_json(vocabulary))).vocab_size == 512
    with pytest.raises(CheckpointError, match=r"'新' \(512\): .*tokenizer\.json"):
        load_tokenizer(beside(tokenizer=tokenizer_json({**vocabulary, "新": 512})))
    last = list(vocabulary)[-1]
    fewer = {piece: i for piece, i in vocabulary.items() if piece != last}
    with pytest.raises(CheckpointError, match=r"lacks tokens of tokenizer\.model: .* \(511\): .*tokenizer\.json"):
        load_tokenizer(beside(tokenizer=tokenizer_json(fewer)))


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<s>": 1, "</s>": 2}},
        {"tokenizer_config": {"added_tokens_decoder": {"1": PLAIN}, "add_bos_token": True, "add_eos_token": None,
                              "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None,
                              "model_max_length": 1000000000000000019884624838656}},
        {"special_tokens_map": {"bos_token": "", "eos_token": "", "pad_token": "</s>"}},
        {"config": {"eos_token_id": [2, 513], "bos_token_id": None}, "generation_config": {"eos_token_id": 2}},
        {"config": b"// settings of another program\n{}", "generation_config": [1]},
        {"config": {"eos_token_id": "of another program"}, "package": {"name": "other"}, "tokenizer": {}},
    ],
    ids=lambda files: "+".join(files),
)  # fmt: skip
def test_what_agrees_or_says_nothing_passes(beside: Beside, files: dict[str, Any]) -> None:
    assert load_tokenizer(beside(**files)).eos_id == 2


@pytest.mark.parametrize("name", ["<pad>", "[PAD]", "<|pad|>", "<|PAD_TOKEN|>"])
def test_a_padding_token_passes_with_a_notice(beside: Beside, name: str) -> None:
    told: list[object] = []
    load_tokenizer(beside(added_tokens={name: 512}, tokenizer_config={"pad_token": name}), told.append)
    assert [event.message for event in told if isinstance(event, Notice)] == [
        f"{beside() / 'added_tokens.json'}: {name!r} (512) is not in tokenizer.model; no row will contain it"
    ]


def test_a_template_without_bos_is_a_warning(beside: Beside, tokenizer_models: dict[str, Path]) -> None:
    """transformers 5 saves one for a bare ``tokenizer.model``, and does not put BOS then; transformers 4 does."""
    bos, text, eos = ({"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}})
    for single, warned in (([bos, text], False), ([text], True), ([bos, text, eos], True)):
        told: list[Any] = []
        processor = {"type": "TemplateProcessing", "single": single}
        load_tokenizer(beside(tokenizer=whole(tokenizer_models["bpe"], post_processor=processor)), told.append)
        assert ["post_processor" in event.message for event in told] == [True] * warned


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer", {"model": [1]}),
        ("tokenizer", {"model": {"vocab": "abc"}}),
        ("tokenizer", {"model": {"vocab": [[]]}}),
        ("tokenizer", {"model": {"vocab": [[5, 0.0]]}}),
        ("tokenizer", {"model": {"vocab": {"a": 1.5}}}),
        ("tokenizer", {"added_tokens": [{"id": 1}]}),
        ("tokenizer", {"added_tokens": 5}),
        ("tokenizer", {"added_tokens": [{"id": 512, "content": ["x"]}]}),
        ("added_tokens", {"<x>": True}),
        ("added_tokens", {"<x>": [512]}),
        ("tokenizer_config", {"added_tokens_decoder": [PLAIN]}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": PLAIN}}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": "<s>"}}),
        ("tokenizer_config", {"eos_token": 2}),
        ("special_tokens_map", {"additional_special_tokens": 3}),
        ("special_tokens_map", {"additional_special_tokens": [["<s>"]]}),
    ],
)
def test_malformed_files_are_one_line(beside: Beside, name: str, content: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"malformed.*{name}\.json") as caught:
        load_tokenizer(beside(**{name: content}))
    assert "\n" not in str(caught.value)


def test_a_model_of_another_name_stands_alone(beside: Beside) -> None:
    directory = beside(added_tokens=CHATML, config={"eos_token_id": 513})
    shutil.copy(directory / "tokenizer.model", directory / "other.model")
    assert load_tokenizer(directory / "other.model").eos_id == 2


def test_the_fixtures_files_agree(shared_fixtures: Path) -> None:
    told: list[object] = []
    load_tokenizer(shared_fixtures / "stories260K-hf", told.append)
    load_tokenizer(shared_fixtures / "stories260K-meta", told.append)
    assert not told


@pytest.mark.parametrize("verb", ["prepare-data", "generate", "evaluate", "train"])
def test_every_verb_that_needs_the_tokenizer_refuses(
    command: Callable[..., Any],
    tiny_base: Callable[..., Path],
    tiny_rows: Path,
    prepared: Callable[..., Path],
    tmp_path: Path,
    verb: str,
) -> None:
    model, data = tmp_path / "model", prepared()
    shutil.copytree(tiny_base(), model)
    (model / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 1}))
    spec = {
        "model": {"path": str(model)},
        "data": {"train": str(data)},
        "lora": {"r": 2},
        "training": {"max_steps": 1, "output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    words = {
        "prepare-data": (tiny_rows, "--tokenizer", model, "--output", tmp_path / "data"),
        "generate": ("--model", model, "--prompt", "a red llama"),
        "evaluate": ("--model", model, "--data", data),
        "train": (tmp_path / "run.yaml",),
    }
    outcome = command(verb, *words[verb])
    assert outcome.code == 4, outcome.stderr
    assert "'<|im_end|>' (1)" in outcome.stderr
    assert not (tmp_path / "data").exists()

"""Meta's ``tokenizer.model`` of Llama 3: ids by tiktoken's own rule, and both formats of the same vocabulary."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hard_texts import HARD_TEXTS, random_texts
from tokenizers import Regex, pre_tokenizers
from trained_tokenizers import LLAMA_3_PATTERN, tiktoken_file
from transformers import AutoTokenizer

from llamatune.errors import CheckpointError
from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer, copy_meta_tokenizer
from llamatune.tokenizers.loading import count_pieces, load_tokenizer
from llamatune.tokenizers.tiktoken_file import definition_of, ranks_of, read_ranks, special_tokens


@pytest.fixture
def meta(json_tokenizers: dict[str, Path], tmp_path: Path) -> Path:
    directory = tmp_path / "meta"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(tiktoken_file(json_tokenizers["llama_3"]))
    (directory / "params.json").write_text("{}")
    return directory


def by_ranks(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's algorithm: join the neighbours whose joined token has the lowest rank, the first of equals."""
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
    ids = []
    for part, _ in split.pre_tokenize_str(text):
        tokens = [part.encode()] if part.encode() in ranks else [bytes([byte]) for byte in part.encode()]
        while True:
            pairs = [(ranks.get(a + b, len(ranks)), n) for n, (a, b) in enumerate(itertools.pairwise(tokens))]
            rank, n = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                break
            tokens[n : n + 2] = [tokens[n] + tokens[n + 1]]
        ids += [ranks[token] for token in tokens]
    return ids


def test_ids_are_those_of_tiktokens_rule(meta: Path) -> None:
    tokenizer, ranks = load_tokenizer(meta), read_ranks(meta / "tokenizer.model")
    assert tokenizer.bos_id == len(ranks)
    assert tokenizer.eos_id == len(ranks) + 1
    assert tokenizer.vocab_size == len(ranks) + 256 == count_pieces(meta / "tokenizer.model")
    for text in [text for text in HARD_TEXTS if len(text) < 1000] + random_texts(300, 1):
        assert tokenizer.encode(text) == [tokenizer.bos_id, *by_ranks(ranks, text)], text


def test_special_tokens_have_metas_ids() -> None:
    ids = {text: 128_000 + number for number, text in enumerate(special_tokens())}
    assert len(ids) == 256
    assert {ids["<|begin_of_text|>"], ids["<|end_of_text|>"]} == {128_000, 128_001}
    assert (ids["<|start_header_id|>"], ids["<|end_header_id|>"], ids["<|eot_id|>"]) == (128_006, 128_007, 128_009)
    assert (ids["<|finetune_right_pad_id|>"], ids["<|eom_id|>"], ids["<|python_tag|>"]) == (128_004, 128_008, 128_010)


def test_there_and_back_between_the_formats(meta: Path, tmp_path: Path) -> None:
    hugging_face, again = tmp_path / "hf", tmp_path / "again"
    hugging_face.mkdir()
    again.mkdir()
    copy_huggingface_tokenizer(meta, hugging_face)
    assert sorted(path.name for path in hugging_face.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    own, other, judge = load_tokenizer(meta), load_tokenizer(hugging_face), AutoTokenizer.from_pretrained(hugging_face)
    for text in HARD_TEXTS:
        assert own.encode(text) == other.encode(text) == judge.encode(text, split_special_tokens=True), text
    assert (own.bos_id, own.eos_id, own.special_ids) == (other.bos_id, other.eos_id, other.special_ids)
    copy_meta_tokenizer(hugging_face, again)
    assert (again / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("kind", ["smollm", "llama_3", "unigram", "llama_2"])
def test_a_definition_that_tiktoken_cannot_say_is_not_written(
    json_tokenizers: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    told: list[object] = []
    copy_meta_tokenizer(json_tokenizers[kind], tmp_path, told.append)
    assert len(told) == 1
    assert not (tmp_path / "tokenizer.model").exists()
    assert (tmp_path / "tokenizer.json").read_bytes() == (json_tokenizers[kind] / "tokenizer.json").read_bytes()


def test_another_pattern_or_merge_is_another_tokenizer(meta: Path) -> None:
    definition = definition_of(read_ranks(meta / "tokenizer.model"))
    assert ranks_of(definition) is not None
    changed = json.loads(json.dumps(definition))
    changed["model"]["merges"].pop()
    assert ranks_of(changed) is None
    changed = json.loads(json.dumps(definition))
    changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    assert ranks_of(changed) is None
    assert ranks_of({"model": 5}) is None


def test_both_files_in_one_directory_must_agree(json_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(json_tokenizers["llama_3"], tmp_path, dirs_exist_ok=True)
    content = tiktoken_file(json_tokenizers["llama_3"])
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(content + base64.b64encode(b"quite new") + b" 500\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json lacks its tokens 'quite"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "rank 1 where 0 is expected"),
        (lambda lines: [*lines[:9], lines[3], *lines[10:]], "rank 3 where 9 is expected"),
        (lambda lines: [*lines, b"!!!! 500"], r"not a token in base64 and its rank: .*tokenizer\.model:501"),
        (lambda lines: [*lines, b"YWJj"], "not a token in base64"),
        (lambda lines: [*lines, b"YWJj x"], "not a token in base64"),
        (lambda lines: [*lines, b"YWJj 500 1"], "rank 500"),
        (lambda lines: [*lines, base64.b64encode(b"a" * 300) + b" 500"], "too long"),
        (lambda lines: [*lines, lines[5].split()[0] + b" 500"], "there twice"),
        (lambda lines: lines[:200], "a tiktoken file without a token for"),
    ],
)
def test_malformed_files_are_told_in_one_line(
    meta: Path, change: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    file = meta / "tokenizer.model"
    file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())) + b"\n")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(meta)
    assert "\n" not in str(caught.value)

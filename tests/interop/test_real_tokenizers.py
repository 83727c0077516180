"""Real tokenizers against transformers and tiktoken: `make test-interop` fetches them; skipped where they lack."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from asking import need
from environments import CACHE, python_of
from hard_texts import HARD_TEXTS, random_texts
from transformers import PreTrainedTokenizerFast

from llamatune.tokenizers.byte_level import bytes_of
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tiktoken_file import definition_of, ranks_of, read_ranks

pytestmark = pytest.mark.interop
TEXTS = HARD_TEXTS + random_texts(2000, 9)
TIKTOKEN = r"""
import base64, json, sys, tiktoken
path, pattern, texts = sys.argv[1], sys.argv[2], json.load(sys.stdin)
ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in open(path, "rb"))}
encoding = tiktoken.Encoding("llama 3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
print(json.dumps([encoding.encode(text, disallowed_special=()) for text in texts]))
"""


def cached(name: str) -> Path:
    if not (CACHE / name).is_dir():
        pytest.skip(f"no {name} in {CACHE}: run `make test-interop` where it can be fetched")
    return CACHE / name


@pytest.mark.parametrize(
    ("name", "size", "bos", "eos"),
    [
        ("llama3.1", 128_256, 128_000, 128_009),
        ("qwen3", 151_669, None, 151_645),
        ("smollm2-135m-instruct", 49_152, None, 2),
    ],
)
def test_ids_are_those_of_transformers(name: str, size: int, bos: int | None, eos: int) -> None:
    path = cached(name)
    tokenizer, judge = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == judge.encode(text, split_special_tokens=True), text
        if name != "qwen3":  # whose text is normalised
            assert tokenizer.decode(ids) == text


def test_metas_file_gives_tiktokens_ids_and_the_published_merges(tmp_path: Path) -> None:
    published = json.loads((cached("llama3.1") / "tokenizer.json").read_text())
    vocabulary = sorted(published["model"]["vocab"].items(), key=lambda item: item[1])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes_of(text)) + b" %d\n" % rank for text, rank in vocabulary))
    ranks = read_ranks(path)
    made = definition_of(ranks)
    assert [" ".join(pair) for pair in made["model"]["merges"]] == published["model"]["merges"]
    assert ranks_of(published) == ranks
    pattern = made["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    need("tiktoken")
    command = [python_of("tiktoken"), "-c", TIKTOKEN, path, pattern]
    done = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True)
    tokenizer = load_tokenizer(path)
    for text, ids in zip(TEXTS, json.loads(done.stdout), strict=True):
        assert tokenizer.encode(text) == [128_000, *ids], text

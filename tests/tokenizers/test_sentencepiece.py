from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatune.errors import CheckpointError, DataError
from llamatune.tokenizers import sentencepiece_check as implementation
from llamatune.tokenizers.loading import count_pieces, load_tokenizer
from llamatune.tokenizers.sentencepiece import SentencePieceTokenizer
from llamatune.tokenizers.tokenizer import check_vocabulary

KINDS = ("bpe", "unigram", "suffix")
SNIPPETS = st.text(alphabet=st.sampled_from(list("ab in:.?1 \n\té日🦙\u0301▁ﬁ\u2028")))


def _held_characters(tokenizer: SentencePieceTokenizer, text: str, ids: list[int], suffix: bool) -> list[set[int]]:
    """For each token the characters of ``text`` that it holds, found by spelling the pieces out, byte by byte.

    Only for models that do not normalise: their pieces spell the text with ▁ for spaces and one ▁ more at an end.
    """
    character_of: list[int | None] = [n for n, c in enumerate(text) for _ in c.replace(" ", "▁").encode()]
    dummy: list[int | None] = [None] * len("▁".encode()) if text else []
    character_of = character_of + dummy if suffix else dummy + character_of
    held, at = [], 0
    for token_id in ids:
        piece = tokenizer.piece(token_id)
        width = 1 if tokenizer._processor.is_byte(token_id) else len(piece.encode())
        held.append({n for n in character_of[at : at + width] if n is not None})
        at += width
    assert at == len(character_of)
    return held


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=SNIPPETS, completion=SNIPPETS)
@settings(max_examples=150, deadline=None)
def test_a_token_belongs_to_the_completion_iff_it_holds_a_character_of_it(
    tokenizer_models: dict[str, Path], kind: str, prompt: str, completion: str
) -> None:
    tokenizer = load_tokenizer(tokenizer_models[kind])
    ids, first = tokenizer.encode_pair(prompt, completion)
    assert ids == tokenizer.encode(prompt + completion)
    if not prompt:
        assert first == (1 if completion else len(ids))
        return
    if not completion:
        assert first == len(ids)
        return
    held = _held_characters(tokenizer, prompt + completion, ids[1:], kind == "suffix")
    for index, characters in enumerate(held, start=1):
        if characters:
            assert (index >= first) == any(character >= len(prompt) for character in characters), (index, held)


@given(prompt=SNIPPETS, completion=SNIPPETS)
@settings(max_examples=150, deadline=None)
def test_the_boundary_of_a_normalising_model_keeps_every_completion_character(
    tokenizer_models: dict[str, Path], prompt: str, completion: str
) -> None:
    """Here a piece may stand for several characters, or one character for several pieces."""
    tokenizer = load_tokenizer(tokenizer_models["normalising"])
    ids, first = tokenizer.encode_pair(prompt, completion)
    assert ids == tokenizer.encode(prompt + completion)
    spans = tokenizer._processor.encode((prompt + completion).encode(), return_type="offset_mapping")["offsets"]
    boundary = len(prompt.encode())
    if prompt and completion:
        assert all(end <= boundary for _, end in spans[: first - 1])
        assert all(end > boundary or begin == end == boundary for begin, end in spans[first - 1 :])


@pytest.mark.parametrize(
    ("prompt", "completion", "completion_pieces"),
    [
        ("Response:", "Seven", ["S", "e", "v", "en"]),
        ("日", "🦙a", ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "a"]),
        ("🦙", "🦙", ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]),
        ("", "🦙", ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]),
        ("\n", "\n", ["<0x0A>"]),
    ],
)
def test_completion_pieces_at_awkward_boundaries(
    tokenizer: SentencePieceTokenizer, prompt: str, completion: str, completion_pieces: list[str]
) -> None:
    ids, first = tokenizer.encode_pair(prompt, completion)
    pieces = [tokenizer.piece(i) for i in ids[first:]]
    assert "".join(pieces) == "".join(completion_pieces)


def test_a_token_across_the_boundary_is_the_completions(tokenizer: SentencePieceTokenizer) -> None:
    whole = next(
        tokenizer.piece(i) for i in range(300, 512) if tokenizer.piece(i) == "▁ans" or len(tokenizer.piece(i)) > 3
    )
    word = whole.replace("▁", " ").strip()
    ids, first = tokenizer.encode_pair("x " + word[0], word[1:])
    assert word[0] in tokenizer.piece(ids[first])
    apart = tokenizer.encode("x " + word[0]) + tokenizer.encode(word[1:])[1:]
    assert ids != apart, "the case is only of interest if encoding apart would give other ids"


def test_exactly_one_bos_and_no_eos(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("<s>Hello</s> <unk>")
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode("") == [tokenizer.bos_id]


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_decode_brings_the_text_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    if not text.startswith(" "):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_decode_drops_specials_and_ids_beyond_the_vocabulary(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode("green hills")
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.vocab_size, 99_999, -1]) == "green hills"


def test_a_tokenizer_survives_pickling(tokenizer: SentencePieceTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("three apples") == tokenizer.encode("three apples")


def test_a_directory_is_searched_for_its_model(tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(tokenizer_models["bpe"])
    assert load_tokenizer(tmp_path).fingerprint.startswith("sha256:")


def test_d4_a_lone_surrogate_is_a_data_error(tokenizer: SentencePieceTokenizer) -> None:
    for attempt in (lambda: tokenizer.encode("a\ud800"), lambda: tokenizer.encode_pair("a", "\udfff")):
        with pytest.raises(DataError, match="lone surrogate") as caught:
            attempt()
        assert caught.value.exit_code == 3


def test_a4_vocabulary_larger_than_the_embedding(tokenizer: SentencePieceTokenizer) -> None:
    check_vocabulary(tokenizer, tokenizer.vocab_size, "model")
    check_vocabulary(tokenizer, tokenizer.vocab_size + 64, "model")
    rows = tokenizer.vocab_size - 8
    message = rf"tokenizer id {tokenizer.vocab_size - 1} >= {rows} embedding rows: some/model"
    with pytest.raises(CheckpointError, match=message) as caught:
        check_vocabulary(tokenizer, rows, "some/model")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"\n <html>", "HTML page"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "tiktoken file without a token for 253"),
        (b"IQ== 0\nIg== 2\n", "rank 2 where 1 is expected"),
        (b'{"version": "1.0", "model": {}}', "has no decoder|its model is of kind 'None'"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"\x0a" + b"\xff" * 10, "not a sound SentencePiece model"),
        (b"\x0a\x05hello", "not a sound SentencePiece model"),
        (b"\x00" * 4096, "not a sound SentencePiece model"),
        (os.urandom(256), "SentencePiece|tokenizer"),
    ],
)
def test_a5_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(path)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        count_pieces(path)


def test_a5_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no decoder"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(tmp_path / "absent.model")


def test_a_tokenizer_without_eos_is_refused(tokenizer_models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no EOS token"):
        load_tokenizer(tokenizer_models["no_eos"])


def test_s5_a_fifo_never_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_s5_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(implementation.LARGEST_MODEL_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than"):
        load_tokenizer(path)


def test_s8_damaged_models_give_an_error_and_never_a_crash(tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    sound = tokenizer_models["bpe"].read_bytes()
    path = tmp_path / "tokenizer.model"
    for damaged in (sound[: len(sound) // 2], sound[:-1], sound[:100] + b"\xff" * 40 + sound[140:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a sound SentencePiece model"):
            load_tokenizer(path)


def test_s8_a_crash_in_the_probe_is_an_error(
    tokenizer_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_PROBE", implementation._PROBE + "\nimport os; os.abort()  # {path}\n")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_models["bpe"].read_bytes() + b"\x00\x00")
    with pytest.raises(CheckpointError, match="not a sound SentencePiece model"):
        load_tokenizer(path)


def test_llama_2_ids_are_the_known_ones(shared_fixtures: Path) -> None:
    tokenizer = load_tokenizer(shared_fixtures / "data" / "llama2_tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]
    ids, first = tokenizer.encode_pair("### Response:", "The capital")
    assert tokenizer.decode(ids[first:]) == "The capital"


def test_pieces_are_counted(shared_fixtures: Path) -> None:
    assert count_pieces(shared_fixtures / "stories260K-hf" / "tokenizer.model") == 512
    assert count_pieces(shared_fixtures / "data" / "llama2_tokenizer.model") == 32000

"""Texts that end a completion: where, against transformers; what is shown; and how little each token costs."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.data.segments import Segment, Segments
from llamatune.inference.gsm8k_answers import AnswerEnds, is_answered
from llamatune.inference.stop_texts import StopTexts
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer

KINDS = ["sentencepiece", "llama_2", "llama_3", "smollm"]
PIECES = ["river", " stone", "é", "日本", "🦙", "\n", "\n\n", "  ", "Q: ", "#### 18", ".", "<tool>", "<0xE2>"]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def directories(
    json_tokenizers: dict[str, Path], tokenizer_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Byte pieces (SentencePiece's, and in JSON) and byte-level vocabularies."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(tokenizer_models["bpe"], directory / "tokenizer.model")
    facts = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(facts))
    return {"sentencepiece": directory, **json_tokenizers}


def _text(chance: random.Random, most: int) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randrange(1, most)))


def _ids(chance: random.Random, tokenizer: Tokenizer, most: int) -> list[int]:
    """Of a text, with tokens among them that end and begin within a character, and special ones."""
    ids = tokenizer.encode(_text(chance, most))
    for _ in range(chance.randrange(3)):
        ids.insert(chance.randrange(1, len(ids) + 1), chance.randrange(tokenizer.vocab_size))
    return ids


def _beginnings(ids: list[int]) -> Iterator[list[int]]:
    return (ids[:end] for end in range(1, len(ids) + 1))


def _first(are_enough: Iterable[bool]) -> int | None:
    """The number of ids at which a completion ends."""
    return next((end for end, is_enough in enumerate(are_enough, 1) if is_enough), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_ends_where_transformers_ends_it(
    directories: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts cut out of the completion anywhere between two characters, and others; several of them."""
    from transformers import AutoTokenizer
    from transformers.generation.stopping_criteria import StopStringCriteria

    tokenizer, theirs = load_tokenizer(directories[kind]), AutoTokenizer.from_pretrained(directories[kind])
    once = functools.cache(StopStringCriteria.clean_tokenizer_vocab)  # which takes most of the time
    monkeypatch.setattr(StopStringCriteria, "clean_tokenizer_vocab", staticmethod(once))
    chance, ends = random.Random(kind), []
    for _ in range(50):
        prompt, ids = _ids(chance, tokenizer, 6), _ids(chance, tokenizer, 30)[1:]
        text, texts = tokenizer.decode([*prompt, *ids]).replace("\ufffd", ""), [_text(chance, 4)]
        for _ in range(chance.randrange(3)):
            begin = chance.randrange(len(text))
            texts.append(text[begin : begin + chance.randrange(1, 9)])
        criteria = StopStringCriteria(theirs, texts)
        padded = torch.tensor([tokenizer.vocab_size] * 30 + prompt + ids)  # as long as the longest text has bytes
        rows = torch.stack([padded[end - 30 : end] for end in range(len(padded) - len(ids) + 1, len(padded) + 1)])
        expected = _first(criteria(rows, None).tolist())
        is_enough = StopTexts(tokenizer, texts).is_enough
        assert _first(is_enough(prompt, begun) for begun in _beginnings(ids)) == expected, (texts, prompt, ids)
        ends.append(expected)
    assert sum(end is not None for end in ends) > 15
    assert None in ends


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_ends_before_the_text(directories: dict[str, Path], kind: str) -> None:
    """Also within a token, and in nothing where the text begins in the prompt."""
    tokenizer, chance, cut = load_tokenizer(directories[kind]), random.Random(kind), 0
    inside = from_prompt = 0
    for _ in range(200):
        prompt, more = tokenizer.encode(_text(chance, 4)), _text(chance, 12)
        ids = tokenizer.encode_continuation(more, prompt)
        whole = tokenizer.decode(prompt) + more
        begin = chance.randrange(max(0, len(whole) - len(more) - 2), len(whole))
        text = whole[begin : begin + chance.randrange(1, 7)]
        stops, segments = StopTexts(tokenizer, [text, "absent"]), Segments((Segment(""),))
        end = _first(stops.is_enough(prompt, begun) for begun in _beginnings(ids))
        if end is None:
            continue
        made = tokenizer.continuation(prompt, ids[:end])
        shown = stops.shown_answer(segments, prompt, ids[:end])
        assert shown == made[: max(0, made.find(text))], (whole, text)
        cut += 1
        from_prompt += text not in made
        inside += text in made and all(tokenizer.continuation(prompt, ids[:place]) != shown for place in range(end))
    assert cut > 150
    assert from_prompt > 5
    assert inside > 5


def test_a_special_token_ends_it_by_its_name(directories: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(directories["llama_3"])
    end = tokenizer.special_ids["<|end_of_text|>"]
    prompt, ids = tokenizer.encode("river"), [*tokenizer.encode_continuation(" stone.", []), end]
    stops = StopTexts(tokenizer, ["<|end_of_text|>"])
    assert [stops.is_enough(prompt, ids[:place]) for place in (len(ids) - 1, len(ids))] == [False, True]
    assert stops.shown_answer(Segments((Segment("river"),)), prompt, ids) == " stone."


def test_tokens_that_are_not_shown_are_passed_over(directories: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(directories["llama_3"])
    prompt, (first, second) = tokenizer.encode("river"), (tokenizer.encode(text)[1:] for text in (" st", "one"))
    ids = [*first, tokenizer.special_ids["<|eot_id|>"], tokenizer.vocab_size + 3, *second]
    stops, segments = StopTexts(tokenizer, ["tone"]), Segments((Segment("river"),))
    assert _first(stops.is_enough(prompt, begun) for begun in _beginnings(ids)) == len(ids)
    assert stops.shown_answer(segments, prompt, ids) == " s"
    assert not stops.is_enough(tokenizer.encode(" stone"), ids[-len(second) - 1 : -len(second)])


class _Counted(list[int]):
    """Ids that remember how many of them are read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found


def test_a_token_costs_the_same_at_any_length(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(directories["llama_3"])
    prompt, ids = _Counted([5] * 4000), _Counted([7] * 4000)
    assert not StopTexts(tokenizer, ["stone", "\n\n"]).is_enough(prompt, ids)
    assert (prompt.read, ids.read) == (0, 37)
    decoded: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda given: decoded.append(len(given)) or decode(given))
    assert not AnswerEnds(tokenizer, few_shot=True).is_enough(prompt, ids)
    assert sum(decoded) < 100


def test_text_without_a_mark_or_a_long_number_is_not_decoded_to_find_its_end(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, decoded = load_tokenizer(directories["sentencepiece"]), list[list[int]]()
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(ids) or decode(ids))
    ids, enough = tokenizer.encode("the river has 12 stones " * 20)[1:], AnswerEnds(tokenizer, few_shot=True).is_enough
    assert not any(enough([], ids[:end]) for end in range(1, len(ids) + 1))
    assert max(map(len, decoded)) == 1, "each token once, alone"
    assert len(decoded) == len(set(map(tuple, decoded)))


GSM8K = ["#### ", "####", " ", "#", "18", "-", "7", ",", ".", "\n", "Question:", "Quest", "ion:", "é", "日本", "river"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few_shot", [False, True])
def test_a_gsm8k_answer_ends_where_its_whole_text_says(directories: dict[str, Path], kind: str, few_shot: bool) -> None:
    """Long answers, numbers of more digits than are looked at, and special tokens in between."""
    tokenizer, chance, ends = load_tokenizer(directories[kind]), random.Random(kind), []
    special = min(tokenizer.special_ids.values())
    for case in range(21):
        before = "".join(chance.choice(GSM8K[5:]) for _ in range(chance.randrange(60)))
        digits = "".join(chance.choice("0123456789,.") for _ in range(chance.choice([1, 3, 50, 80])))
        text = before.replace("Question:", "") + chance.choice(GSM8K[:2]) + digits
        text += "".join(chance.choice(GSM8K) for _ in range(chance.randrange(12)))
        ids = tokenizer.encode_continuation(text, [])
        ids[len(ids) // 2 : len(ids) // 2] = [special] * (60 * (case % 3))
        enough = AnswerEnds(tokenizer, few_shot).is_enough
        expected = _first(is_answered(tokenizer.decode(begun), few_shot) for begun in _beginnings(ids))
        assert _first(enough([], begun) for begun in _beginnings(ids)) == expected, text
        ends.append(expected)
    assert sum(end is not None for end in ends) > 5
    assert None in ends


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base(vocab_size=90)  # as many as the tokenizer has


def _results(outcome: Any) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.stderr
    results: list[dict[str, Any]] = json.loads(outcome.stdout)["results"]
    return results


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_generate_ends_each_prompt_at_the_first_of_its_texts(command: Command, base: Path, temperature: float) -> None:
    words = ["generate", "--model", base, "--json", "--temperature", temperature, "--max-new-tokens", 30]
    words += ["--prompt", "a red llama", "--prompt", "nine apples", "--prompt", "cold rain"]
    free = _results(command(*words))
    texts = [free[0]["completion"][9:12], free[1]["completion"][4:6]]
    tokenizer = load_tokenizer(base / "tokenizer.model")
    stopped = _results(command(*words, "--stop", texts[0], "--stop", texts[1]))
    for before, after in zip(free, stopped, strict=True):
        whole, own = before["prompt"] + before["completion"], len(before["prompt"])
        found = [whole.find(text, own + 1 - len(text)) for text in texts]
        places = [max(0, place - own) for place in found if place >= 0]
        assert after["completion"] == before["completion"][: min(places, default=None)]
        assert after["finish_reason"] == ("stop" if places else before["finish_reason"])
        count = len(after["completion_ids"])
        assert after["completion_ids"] == before["completion_ids"][:count]
        if places:
            prompt = tokenizer.encode(after["prompt"])
            made = [tokenizer.continuation(prompt, before["completion_ids"][:n]) for n in (count - 1, count)]
            tails = [(after["prompt"] + one)[own + 1 - len(text) :] for one in made for text in texts]
            assert [texts[0] in tails[0] or texts[1] in tails[1], texts[0] in tails[2] or texts[1] in tails[3]] == [
                False,
                True,
            ]
    assert [result["finish_reason"] for result in stopped][:2] == ["stop", "stop"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--stop", ""], "an empty text"),
        (["--stop", "x", "--num-beams", 2], "--stop and --num-beams exclude each other"),
        (["--num-return-sequences", 3, "--num-beams", 2], "--num-return-sequences is 3 of 2 beams"),
        (["--num-return-sequences", 2, "--temperature", 0], "a greedy completion is always the same"),
    ],
)
def test_what_cannot_be_is_refused_by_name(command: Command, words: Sequence[Any], error: str) -> None:
    refused = command("generate", "--model", "absent", "--prompt", "x", *words)
    assert (refused.code, refused.stdout) == (2, "")
    assert error in refused.stderr
    assert refused.stderr.count("\n") == 1

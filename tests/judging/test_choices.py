"""Multiple-choice rows and their scores: lm-evaluation-harness's prompts, transformers' log-likelihoods."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llamatune.command_options.inference import ModelSource
from llamatune.data.choice_rows import ChoiceQuestion, read_choices
from llamatune.errors import DataError
from llamatune.inference.choice_scores import ChoiceScore, choice_batches, encode_choices, score_choices
from llamatune.inference.model_source import open_model
from llamatune.tokenizers.loading import load_tokenizer

MMLU = {
    "question": " How many? ",
    "subject": "high_school_physics",
    "choices": ["one", "two", "3", "four"],
    "answer": 2,
}
HELLASWAG = {
    "activity_label": "Baking", "ctx_a": "A man  stands. [header] How [title] Stir it", "ctx_b": "he Then",
    "endings": [" eats. [title] More", "[step]", "sings  now.", "ends."], "label": "3",
}  # fmt: skip
ARC = {"question": "Why?", "choices": {"text": ["a b", "c"], "label": ["1", "2"]}, "answerKey": "2"}
AI2 = {"question": {"stem": "Why?", "choices": [{"text": "a b", "label": "A"}, {"text": "c", "label": "B"}]},
       "answerKey": "B"}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_prompts_of_the_three_shapes_are_the_harness_own(tmp_path: Path) -> None:
    mmlu = read_choices(write(tmp_path / "m.jsonl", MMLU, {**MMLU, "subject": None, "answer": "C"}))
    lines = "How many?\nA. one\nB. two\nC. 3\nD. four\nAnswer:"
    about = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert mmlu.shape == "mmlu"
    assert [question.prompt for question in mmlu.questions] == [about + lines, lines]
    assert [(question.choices, question.right) for question in mmlu.questions] == [(("A", "B", "C", "D"), 2)] * 2
    (asked,) = read_choices(write(tmp_path / "h.jsonl", HELLASWAG)).questions
    assert asked.prompt == "Baking: A man stands. How. Stir it He then"
    assert asked.choices == ("eats.. More", "", "sings now.", "ends.")
    assert asked.right == 3
    for row in (ARC, AI2):
        (asked,) = read_choices(write(tmp_path / "a.jsonl", row)).questions
        assert (asked.prompt, asked.choices, asked.right) == ("Question: Why?\nAnswer:", ("a b", "c"), 1)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": "x"}, "no known shape; it has the fields 'text'"),
        ({**MMLU, "choices": ["a", "b"]}, "2 choices, and MMLU has 4"),
        ({**MMLU, "answer": 4}, "'answer' of the row is '4', not one of 0 to 3"),
        ({**MMLU, "answer": True}, "'answer'"),
        ({**MMLU, "question": " "}, "'question' of the row is empty"),
        ({**HELLASWAG, "label": ""}, "'label'"),
        ({**HELLASWAG, "endings": "x"}, "'endings'"),
        ({**ARC, "answerKey": "E"}, "answerKey is 'E', and the labels are '1, 2'"),
        ({**ARC, "choices": {"text": ["a", "b"], "label": ["2", "2"]}}, "answerKey is '2', and the labels are '2, 2'"),
        ({**ARC, "choices": 3}, "'choices' of the row is a number"),
        ({**ARC, "choices": {"text": ["a", ""], "label": ["1", "2"]}}, "'text' of the row is empty"),
    ],
)
def test_a_row_that_is_no_question_is_named_by_its_line(tmp_path: Path, row: Any, part: str) -> None:
    sound = HELLASWAG if "endings" in row else ARC if "answerKey" in row else MMLU
    path = write(tmp_path / "rows.jsonl", *([sound] if "text" not in row else []), row)
    with pytest.raises(DataError, match=r"rows\.jsonl") as fault:
        read_choices(path)
    assert part in str(fault.value)
    assert f"rows.jsonl:{1 if 'text' in row else 2}" in str(fault.value)


def test_rows_of_two_shapes_in_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the first row is of the shape arc"):
        read_choices(write(tmp_path / "rows.jsonl", ARC, HELLASWAG))
    with pytest.raises(DataError, match="no rows"):
        read_choices(write(tmp_path / "rows.jsonl"))


def questions(count: int) -> list[ChoiceQuestion]:
    """Questions with choices of several tokens and of one, some in more than one batch, with a space at the end."""
    chance, made = random.Random(4), []
    words = [
        "a red llama",
        "walks",
        "over green hills",
        "and counts nine",
        "blue",
        "apples é",
        "rain falls on old stones",
    ]
    for number in range(count):
        prompt = " ".join(chance.choices(words, k=chance.randrange(1, 9))) + (" " if number % 3 == 0 else ":")
        choices = tuple(chance.sample(words, 4)) if number % 2 else ("a", "b", "c", "d", "e")
        made.append(ChoiceQuestion(number + 1, prompt, choices, chance.randrange(4)))
    return made


def by_transformers(base: Path, model: Any, question: ChoiceQuestion, most: int) -> list[float]:
    """Each choice alone: its text encoded by SentencePiece, summed log-probabilities of what follows the prompt."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    found = []
    for choice in question.choices:
        before, text = question.prompt.rstrip(" "), f"{question.prompt} {choice}"
        context = [1, *pieces.encode(before)]
        continuation = [1, *pieces.encode(text)][len(context) :]
        ids = torch.tensor([(context + continuation)[-(most + 1) :]])
        with torch.no_grad():
            logs = model(ids[:, :-1]).logits[0].log_softmax(-1)
        found.append(sum(float(logs[place - len(continuation), token]) for place, token in enumerate(continuation)))
    return found


@pytest.mark.parametrize("most", [256, 12])
def test_each_choice_has_the_loglikelihood_that_transformers_gives_it(
    tiny_base: Callable[..., Path], most: int
) -> None:
    """Also where the prompt is longer than the context, whatever is computed together."""
    base, asked = tiny_base(), questions(9)
    tokenizer = load_tokenizer(base)
    model = open_model(ModelSource(base)).load(lambda event: None, lambda: False).by_prefix[""]
    encoded = [encode_choices(question, tokenizer, most, "rows") for question in asked]
    scores = [score for batch in choice_batches(encoded, 6) for score in score_choices(model, batch)]
    assert [score.row for score in scores] == [question.row for question in asked]
    from transformers import AutoModelForCausalLM

    judge, cut = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), 0
    for question, score in zip(asked, scores, strict=True):
        expected = by_transformers(base, judge, question, most)
        assert score.loglikelihoods == pytest.approx(expected, abs=2e-4)
        cut += any(len(tokenizer.encode(f"{question.prompt} {choice}")) > most + 1 for choice in question.choices)
        taken = max(range(len(expected)), key=expected.__getitem__)
        lengths = [len(choice) for choice in question.choices]
        by_length = max(range(len(expected)), key=lambda n: expected[n] / lengths[n])
        assert (score.acc, score.acc_norm) == (taken == question.right, by_length == question.right)
    assert sum(question.is_cut for question in encoded) == cut
    assert (cut > 0) == (most == 12)


def test_letters_are_computed_in_one_pass(tiny_base: Callable[..., Path]) -> None:
    question = ChoiceQuestion(1, "a red llama", ("a", "b", "c", "d"), 0)
    encoded = encode_choices(question, load_tokenizer(tiny_base()), 256, "rows")
    if set(encoded.choice_tokens) == {1}:
        assert len({ids[:-1] for ids in encoded.ids}) == 1
    else:  # the tokenizer spells a letter with a space before it: then these tokens differ in their last alone
        assert len({ids[:-1] for ids in encoded.ids}) < 4


def test_the_two_rules_differ_by_the_characters_of_a_choice() -> None:
    asked = ChoiceQuestion(1, "x", ("ab", "abcd", "é", ""), 1)
    score = ChoiceScore.of(asked, [-2.0, -3.0, -9.0, -1.0])
    assert (score.acc, score.acc_norm) == (False, True)  # by length -1, -0.75, -9 and, of no character, -inf
    assert ChoiceScore.of(asked, [-2.0, -2.0, -2.0, -2.0]).acc is False  # the first of equals is taken
    assert math.isclose(sum(score.loglikelihoods), -15)


def test_a_choice_without_room_is_refused(tiny_base: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny_base())
    with pytest.raises(DataError, match="there is room for 1 to 3"):
        encode_choices(ChoiceQuestion(7, "a", ("over green hills", "b"), 0), tokenizer, 3, "rows.jsonl: row 7")

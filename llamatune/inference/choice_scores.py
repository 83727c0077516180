"""Scores of multiple-choice questions by the log-likelihood of each choice, as lm-evaluation-harness has them.

``acc``: the likeliest choice is the right one. ``acc_norm``: the likeliest per character of the choice, without the
space before it (the harness divides by characters; ``acc_bytes`` there divides by bytes). The first of equals counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from llamatune.data.choice_rows import ChoiceQuestion
from llamatune.errors import DataError
from llamatune.model.loss import next_token_losses
from llamatune.model.transformer import Transformer
from llamatune.tokenizers.tokenizer import Tokenizer

_DELIMITER = " "


@dataclass(frozen=True)
class EncodedChoices:
    """A question as the model reads it: ids of prompt and choice of each choice, and how many of them the choice has.

    ``is_cut``: a prompt lost its beginning, for which the model has no room.
    Equal ids but for the last, as those of MMLU's letters, are computed once.
    """

    question: ChoiceQuestion
    ids: tuple[tuple[int, ...], ...]
    choice_tokens: tuple[int, ...]
    is_cut: bool


@dataclass(frozen=True)
class ChoiceScore:
    """A question's log-likelihood of each choice, in nats, and whether its two rules took the right one."""

    row: int
    loglikelihoods: tuple[float, ...]
    acc: bool
    acc_norm: bool

    @classmethod
    def of(cls, question: ChoiceQuestion, loglikelihoods: Sequence[float]) -> ChoiceScore:
        """By the two rules."""
        pairs = zip(loglikelihoods, question.choices, strict=True)
        per_character = [ll / len(text) if text else -math.inf for ll, text in pairs]
        taken, taken_by_length = (max(range(len(s)), key=s.__getitem__) for s in (loglikelihoods, per_character))
        return cls(question.row, tuple(loglikelihoods), taken == question.right, taken_by_length == question.right)


def encode_choices(question: ChoiceQuestion, tokenizer: Tokenizer, most: int, where: object) -> EncodedChoices:
    """The ids that the harness computes: prompt and choice in one text, cut where the prompt alone would end.

    White space at the prompt's end goes to the choice. What is longer than ``most`` tokens and one (the last is only
    predicted) loses its beginning.

    Raises:
        DataError: a choice has no token of its own, or more than the model knows.
    """
    prompt = question.prompt.rstrip()
    moved = question.prompt[len(prompt) :]
    before = tokenizer.encode(prompt)
    of_choices, counts, is_cut = list[tuple[int, ...]](), list[int](), False
    for choice in question.choices:
        behind = tokenizer.encode(prompt + moved + _DELIMITER + choice)[len(before) :]
        if not 0 < len(behind) <= most:
            what = f"the choice {choice[:60]!r} has {len(behind)} tokens, and there is room for 1 to {most}"
            raise DataError(what, where, "leave the row out")
        is_cut |= len(before) + len(behind) > most + 1
        ids = (*before, *behind)[-(most + 1) :]
        if len(ids) == len(behind):
            raise DataError(f"nothing precedes the choice {choice[:60]!r}", where, "leave the row out")
        of_choices.append(ids)
        counts.append(len(behind))
    return EncodedChoices(question, tuple(of_choices), tuple(counts), is_cut)


def score_choices(model: Transformer, asked: Sequence[EncodedChoices]) -> list[ChoiceScore]:
    """The score of each question, all computed in one pass; the model is in evaluation mode."""
    passes = dict.fromkeys(ids[:-1] for question in asked for ids in question.ids)
    ends = accumulate(map(len, passes))
    begins = {ids: end - len(ids) for ids, end in zip(passes, ends, strict=True)}
    positions, targets = list[int](), list[int]()
    for question in asked:
        for ids, count in zip(question.ids, question.choice_tokens, strict=True):
            first = len(ids) - count
            positions += range(begins[ids[:-1]] + first - 1, begins[ids[:-1]] + len(ids) - 1)
            targets += ids[first:]
    row = torch.tensor([[token for ids in passes for token in ids]])
    losses = next_token_losses(model, row, tuple(map(len, passes)), torch.tensor(positions), torch.tensor(targets))
    of_choices = iter(torch.split(losses, [count for question in asked for count in question.choice_tokens]))
    return [
        ChoiceScore.of(question.question, [-float(next(of_choices).sum()) for _ in question.ids]) for question in asked
    ]


def choice_batches(asked: Sequence[EncodedChoices], size: int) -> Iterator[list[EncodedChoices]]:
    """Whole questions in order, ``size`` rows that differ or fewer at a time, at least one question."""
    batch, rows = list[EncodedChoices](), 0
    for question in asked:
        own = len({ids[:-1] for ids in question.ids})
        if batch and rows + own > size:
            yield batch
            batch, rows = [], 0
        batch.append(question)
        rows += own
    if batch:
        yield batch

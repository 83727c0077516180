"""Which token comes next, against a distribution computed token by token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatune.command_options.inference import Sampling
from llamatune.errors import NumericsError, SpecError
from llamatune.inference.sampling import (
    NO_TOKEN,
    chosen_tokens,
    next_tokens,
    penalised,
    token_distribution,
    tokens_at,
)

# Far enough apart that rounding cannot swap two tokens.
LOGITS = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True).map(lambda found: [v / 8 for v in found])


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> dict[int, float]:
    """Probability of every token that may be drawn: temperature, then top-k, then top-p."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or len(weights)]
    total, reached, nucleus = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        nucleus.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    total = sum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


@settings(deadline=None)
@given(
    LOGITS,
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.none() | st.integers(1, 14),
    st.sampled_from([0.05, 0.313, 0.7771, 0.95, 1.0]),
)
def test_the_distribution_is_the_one_by_hand(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = token_distribution(torch.tensor([logits]), sampling)[0].tolist()
    expected = by_hand(logits, temperature, top_k, top_p)
    assert found == pytest.approx([expected.get(token, 0.0) for token in range(len(logits))], abs=1e-5)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 1 << 30), st.floats(0.2, 3), st.none() | st.integers(1, 60), st.floats(0.05, 1), st.floats(0, 1),
    st.floats(0.5, 2),
)  # fmt: skip
@example(seed=0, temperature=1.0, top_k=None, top_p=0.99999, min_p=0.0, penalty=1.0)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float, min_p: float, penalty: float
) -> None:
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(3, 50, generator=generator) * 3, torch.randint(50, (3, 12), generator=generator)
    steps = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(temperature)]
    steps += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    steps += [theirs.TopPLogitsWarper(top_p), theirs.MinPLogitsWarper(min_p)]
    expected = logits
    for step in steps:
        expected = step(ids, expected)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = token_distribution(penalised(logits, seen, penalty), sampling)
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-6, rtol=1e-5)


def test_rows_do_not_meet() -> None:
    logits, sampling = torch.randn(5, 40), Sampling(temperature=0.8, top_k=9, top_p=0.8)
    together = token_distribution(logits, sampling)
    alone = torch.cat([token_distribution(row[None], sampling) for row in logits])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.sum(-1), torch.ones(5))


def test_the_nucleus_is_counted_among_the_top_k() -> None:
    """0.4, 0.3, 0.2, 0.1: of the first two the likelier has 0.57, which is over 0.5; of all four it has not."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert token_distribution(logits, Sampling(temperature=1.0, top_k=2, top_p=0.5))[0].tolist() == pytest.approx(
        [1, 0, 0, 0]
    )
    assert token_distribution(logits, Sampling(temperature=1.0, top_p=0.5))[0].tolist() == pytest.approx(
        [4 / 7, 3 / 7, 0, 0]
    )


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    sampling, generator = Sampling(temperature=1.3, top_k=4, top_p=0.97), torch.Generator().manual_seed(1)
    drawn = Counter(next_tokens(logits, sampling, [generator])[0] for _ in range(4000))
    for token, probability in enumerate(token_distribution(logits, sampling)[0].tolist()):
        assert abs(drawn[token] / 4000 - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000) + 1e-9


# Draws on a GPU: a number of each generator, and the token at which the sums of probabilities exceed it.


@settings(deadline=None)
@given(LOGITS, st.sampled_from([0.7, 1.0, 2.5]), st.none() | st.integers(1, 9), st.sampled_from([0.313, 0.95, 1.0]))
def test_numbers_that_are_spread_evenly_give_each_token_its_share(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    """Of N numbers in equal distances a token gets N p, but for one at each end of its interval."""
    count, sampling = 2000, Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    distribution = token_distribution(torch.tensor([logits]), sampling).expand(count, -1)
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = Counter(tokens_at(distribution, numbers).tolist())
    expected = by_hand(logits, temperature, top_k, top_p)
    assert found.keys() <= expected.keys()
    for token, probability in expected.items():
        assert abs(found[token] - count * probability) <= 1.01


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40).filter(any))
def test_the_least_and_the_largest_number_give_tokens_that_can_be_drawn(weights: list[float]) -> None:
    row = torch.tensor(weights)
    ends = torch.tensor([0, 1 - 2.0**-52], dtype=torch.float64)
    first, last = tokens_at((row / row.sum()).expand(2, -1), ends).tolist()
    possible = (row / row.sum()).nonzero()[:, 0].tolist()
    assert first == possible[0]
    assert last in possible
    assert first <= last


def test_tokens_chosen_on_the_device_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    sampling, generator = Sampling(temperature=1.3, top_k=4, top_p=0.97), torch.Generator().manual_seed(1)
    drawn = Counter(chosen_tokens(logits.expand(4000, -1), sampling, [generator] * 4000).tolist())
    for token, probability in enumerate(token_distribution(logits, sampling)[0].tolist()):
        assert abs(drawn[token] / 4000 - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000) + 1e-9


def test_a_token_chosen_on_the_device_depends_on_its_row_and_its_generator_alone() -> None:
    logits, sampling = torch.randn(7, 40), Sampling(temperature=1.5, top_p=0.95)
    together = chosen_tokens(logits, sampling, [torch.Generator().manual_seed(row) for row in range(7)])
    alone = [chosen_tokens(logits[row : row + 1], sampling, [torch.Generator().manual_seed(row)]) for row in range(7)]
    assert torch.equal(together, torch.cat(alone))
    again = [torch.Generator().manual_seed(row) for row in range(7)]
    first, second = (chosen_tokens(logits.flip(0), sampling, again[::-1]) for _ in range(2))
    assert torch.equal(first.flip(0), together)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_only_the_row_that_is_not_finite_has_no_token(temperature: float, broken: float) -> None:
    logits = torch.randn(3, 30)
    logits[1, 7] = broken
    tokens = chosen_tokens(logits, Sampling(temperature=temperature), [torch.Generator()] * 3).tolist()
    assert [token == NO_TOKEN for token in tokens] == [False, True, False]


def test_temperature_zero_takes_the_likeliest_whatever_else_is_asked() -> None:
    logits = torch.randn(7, 30)
    assert next_tokens(logits, Sampling(temperature=0, top_k=3, top_p=0.2), []) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"top_k": 0}, "--top-k"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"num_beams": 0}, "--num-beams"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_options_name(values: dict[str, float], option: str) -> None:
    with pytest.raises(SpecError, match=option) as raised:
        Sampling(**values)  # type: ignore[arg-type]
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_next_token(temperature: float, broken: float) -> None:
    logits = torch.randn(2, 30)
    logits[1, 7] = broken
    with pytest.raises(NumericsError, match="NaN or infinity"):
        next_tokens(logits, Sampling(temperature=temperature), [torch.Generator()] * 2)


def in_columns(logits: Tensor) -> Tensor:
    return logits.T.contiguous().T


def with_rows_left_out(logits: Tensor) -> Tensor:
    return in_columns(torch.cat((logits, torch.full_like(logits[:3], 1e3))))[: len(logits)]


@pytest.mark.parametrize("lying", [torch.Tensor.contiguous, in_columns, with_rows_left_out])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [30, 64, 320, 32000, 257, 32003])
@pytest.mark.parametrize("rows", [1, 50])
def test_the_greedy_token_is_the_first_of_the_largest(
    vocabulary: int, rows: int, dtype: torch.dtype, lying: Callable[[Tensor], Tensor]
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    drawn = torch.randint(9, (rows, vocabulary), generator=generator).to(dtype)  # with many equals
    logits = lying(drawn)
    greedy = Sampling(temperature=0)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert next_tokens(logits, greedy, []) == expected
    for place in (0, vocabulary // 2, vocabulary - 1):
        for bad in (torch.nan, torch.inf):
            broken = drawn.clone()
            broken[rows // 2, place] = bad
            with pytest.raises(NumericsError):
                next_tokens(lying(broken), greedy, [])


@pytest.mark.parametrize("lying", [in_columns, with_rows_left_out])
def test_what_is_drawn_does_not_depend_on_how_logits_lie(lying: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(50, 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01)
    draws = [
        next_tokens(one, sampling, [torch.Generator().manual_seed(row) for row in range(50)])
        for one in (logits, lying(logits))
    ]
    assert draws[0] == draws[1]

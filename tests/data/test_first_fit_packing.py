"""Packing: every sample once, no row too long, as few rows as first-fit-decreasing promises, and a pure function."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from llamatune.data.packing import epoch_rows, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def first_fit_decreasing_by_hand(lengths: list[int], budget: int) -> list[int]:
    """How full each row is, found by looking at every row."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        for place, filled in enumerate(rows):
            if filled + length <= budget:
                rows[place] += length
                break
        else:
            rows.append(length)
    return rows


@given(LENGTHS, st.integers(10, 100), st.randoms())
def test_it_is_first_fit_decreasing(lengths: list[int], budget: int, chance: random.Random) -> None:
    order = list(range(len(lengths)))
    chance.shuffle(order)
    rows = pack(lengths, budget, order)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[index] for index in row) <= budget for row in rows)
    assert [sum(lengths[index] for index in row) for row in rows] == first_fit_decreasing_by_hand(lengths, budget)


def test_the_number_of_rows_is_the_same_in_every_epoch_and_the_company_changes() -> None:
    chance = random.Random(1)
    lengths = [chance.randint(5, 90) for _ in range(300)]
    epochs = [epoch_rows(lengths, 7, epoch, True, 128) for epoch in range(5)]
    assert len({len(rows) for rows in epochs}) == 1
    assert len({frozenset(frozenset(row) for row in rows) for rows in epochs}) == 5
    assert epochs == [epoch_rows(lengths, 7, epoch, True, 128) for epoch in range(5)]
    assert len(epochs[0]) <= math.ceil(11 / 9 * sum(lengths) / 128) + 1


def test_without_a_budget_a_row_is_a_sample_and_without_shuffling_the_files_order_stays() -> None:
    assert epoch_rows([3, 4, 5], 0, 0, False, None) == [[0], [1], [2]]
    rows = epoch_rows([3, 4, 5, 6], 0, 2, False, 9)
    assert [min(row) for row in rows] == sorted(min(row) for row in rows)
    assert rows == epoch_rows([3, 4, 5, 6], 0, 0, False, 9)

"""Packing of several samples into one row (first-fit-decreasing, Johnson 1973), and the order of an epoch's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llamatune.seeds import derived_seed


def pack(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """The samples of each row of at most ``budget`` tokens; a longer sample has a row of its own.

    Samples are placed longest first, those of equal length in ``order``, each in the first row with room. The number of
    rows depends on the lengths alone.
    """
    rows: list[list[int]] = []
    # A segment tree finds the first row with room in logarithmic time: each leaf is a row, the first one yet unused
    # included, and each other node has the most room of its children 2n and 2n + 1.
    leaves = 1 << max(0, len(order) - 1).bit_length()
    room = [budget] * (2 * leaves)
    for index in sorted(order, key=lambda index: -lengths[index]):
        tokens = min(lengths[index], budget)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < tokens:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= tokens
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def epoch_rows(lengths: Sequence[int], seed: int, epoch: int, shuffle: bool, budget: int | None) -> list[list[int]]:
    """The samples of each row of epoch ``epoch`` (from 0), in training order: a function of (seed, epoch).

    Without a ``budget`` a row is one sample. With a budget (tokens), ``shuffle`` packs other samples together in each
    epoch; the number of rows stays the same.
    """
    order = _permutation(len(lengths), derived_seed(seed, "order", epoch)) if shuffle else range(len(lengths))
    if budget is None:
        return [[index] for index in order]
    rows = pack(lengths, budget, order)
    if not shuffle:
        return sorted(rows, key=min)
    return [rows[place] for place in _permutation(len(rows), derived_seed(seed, "rows", epoch))]


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

"""Packing of several samples into one row: first-fit-decreasing bin packing (Johnson 1973)."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """The samples of each row of at most ``budget`` tokens; a longer sample has a row of its own.

    Samples are placed longest first, those of equal length in ``order``, each in the first row with room. The number of
    rows depends on the lengths alone.
    """
    rows: list[list[int]] = []
    room = _FirstFit(len(lengths))
    for index in sorted(order, key=lambda index: -lengths[index]):
        row = room.take(lengths[index])
        if row is None:
            row = len(rows)
            rows.append([])
            room.open(row, max(0, budget - lengths[index]))
        rows[row].append(index)
    return rows


class _FirstFit:
    """A segment tree of the room left in each row: finds the first row with enough room in logarithmic time."""

    def __init__(self, rows: int) -> None:
        self._leaves = 1 << max(1, rows - 1).bit_length()
        self._most = [0] * (2 * self._leaves)

    def open(self, row: int, room: int) -> None:
        self._set(self._leaves + row, room)

    def take(self, tokens: int) -> int | None:
        """The first row with room for ``tokens``, which are subtracted from it; None: no row has room."""
        if self._most[1] < tokens:
            return None
        node = 1
        while node < self._leaves:
            node *= 2
            if self._most[node] < tokens:
                node += 1
        self._set(node, self._most[node] - tokens)
        return node - self._leaves

    def _set(self, node: int, room: int) -> None:
        self._most[node] = room
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])

"""Packing of several samples into one row: first-fit-decreasing bin packing (Johnson 1973)."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """Distribute samples over rows of at most ``budget`` tokens; a longer sample has a row of its own.

    Samples are taken longest first, equal ones in ``order``, each into the first row that has room. The number of rows
    depends on the lengths alone.
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
    """A tree of maxima over the room that is left in each row: the first row with enough is found in log time."""

    def __init__(self, rows: int) -> None:
        self._leaves = 1 << max(1, rows - 1).bit_length()
        self._most = [0] * (2 * self._leaves)

    def open(self, row: int, room: int) -> None:
        self._set(self._leaves + row, room)

    def take(self, tokens: int) -> int | None:
        """The first row with room for ``tokens``, which it then has less."""
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

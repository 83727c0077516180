"""Adapter switch: for each sample of a pass, whether the adapter acts on it; the others get what the base computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AdapterSwitch:
    """Shared by the adapted layers of a model, which then computes base and tuned model in one pass.

    The frozen products are computed once, for all samples. A new switch lets the adapter act on all of them.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Let the adapter act on all samples."""
        self._set: tuple[tuple[bool, ...], tuple[int, ...], int, int] | None = None
        self._acts: tuple[Tensor, ...] = ()

    def set(
        self, acts: Sequence[bool], lengths: Sequence[int], device: torch.device, filling: int = 0, twice: int = 0
    ) -> None:
        """Say of which samples of the next pass the adapter is a part, and how many positions each has.

        ``filling``: positions behind them that belong to none. The last block may compute one position of each sample,
        and so many more that are there ``twice``.
        """
        wanted = tuple(acts), tuple(lengths), filling, twice
        if wanted == self._set:  # most steps differ from the one before in nothing, and a copy to a GPU waits for it
            return
        self._set, self._acts = wanted, ()
        if not all(acts):
            by_position = [act for act, length in zip(acts, lengths, strict=True) for _ in range(length)]
            by_position += [False] * filling
            by_sample = [*acts, *[False] * twice]
            assert len(by_position) != len(by_sample) or by_position == by_sample, "``choose`` goes by their number"
            both = torch.tensor([*by_position, *by_sample], device=device)
            self._acts = both[: -len(by_sample)], both[-len(by_sample) :]

    def hold(self, acts: Tensor) -> None:
        """As ``set``, of samples with one position each, by a tensor (B,) of bool that may change between passes."""
        self._set, self._acts = None, (acts,)

    def choose(self, adapted: Tensor, base: Tensor) -> Tensor:
        """``adapted`` (B, T, ...) at the positions on which the adapter acts, ``base`` elsewhere."""
        if not self._acts:
            return adapted
        positions = adapted.shape[:-1]
        acts = next(acts for acts in self._acts if len(acts) == positions.numel())
        return torch.where(acts.view(*positions, 1), adapted, base)

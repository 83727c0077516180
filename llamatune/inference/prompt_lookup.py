"""Prompt lookup: drafts of the next tokens from the text so far (Saxena 2023), made while they are measured to pay.

A draft is what followed the last tokens where they stood before. The model checks it in one pass over several tokens
(Leviathan et al. 2023), so a completion has the same tokens with drafts and without.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence

_DRAFTED_TOKENS = 8
_GRAMS = (3, 2)
"""Tokens that are looked up, the more the surer."""

_LEAST_GAIN = 1.1
"""By what a drafted step must be faster, for each token, than steps without a draft."""

_FIRST_TOKENS = 2.0
"""Tokens that a drafted step must be expected to give as long as its time is unknown."""

_NEWEST = 0.3
"""Weight of the newest draft in the expected number of tokens."""

_TIMES, _LEAST_TIMES = 5, 2  # the first step of a size may take longer
_FIRST_WAIT_TOKENS = 64


class Continuations:
    """A text of tokens, and where each few of them stood last; a token costs the same however long the text is."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    @property
    def length(self) -> int:
        return len(self._ids)

    def add(self, token: int) -> None:
        """Go on by ``token``. The tokens before it are found from now on."""
        for size in _GRAMS:
            if len(self._ids) >= size:
                self._ends[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, tokens: int) -> list[int]:
        """So many tokens that may follow, or none. A continuation that reaches the end of the text is repeated."""
        for size in _GRAMS:
            if (end := self._ends.get(tuple(self._ids[-size:]))) is not None:
                period = len(self._ids) - end
                return [self._ids[end + place % period] for place in range(tokens)]
        return []


class PromptLookup:
    """Drafts for the only sequence that runs, and whether they pay.

    The tokens that a draft gives are also counted while none is made, by comparing one with what follows, which costs
    nothing. Times are of steps with a draft and without: the least of the latest, since a busy machine only adds.

    ``in_16_bits``: also of a greedy completion in 16 bits, where a near tie may then fall otherwise.
    """

    def __init__(self, in_16_bits: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.in_16_bits, self._clock = in_16_bits, clock
        self._plain, self._drafted = deque[float](maxlen=_TIMES), deque[float](maxlen=_TIMES)
        self._wait, self._waited = _FIRST_WAIT_TOKENS, 0
        self._started = 0.0
        self._begin(-1)

    def _begin(self, number: int) -> None:
        self._number, self._text = number, Continuations()
        self._expected = 1.0  # tokens that a drafted step gives
        self._compared: list[int] = []  # with what follows
        self._right = 0  # of them, so far
        self._is_drafted = False

    def draft(self, number: int, prompt: Sequence[int], chosen: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``chosen``, which follow ``prompt``; none: step without a draft.

        ``number`` is that of the sequence. ``took`` tells what came of the step.
        """
        self._started = self._clock()
        if number != self._number:
            self._begin(number)
        known = self._text.length
        for token in itertools.chain(prompt[known:], chosen[max(0, known - len(prompt)) :]):
            self._text.add(token)
            self._compare(token)
        draft = self._text.draft(min(most, _DRAFTED_TOKENS))
        self._is_drafted = bool(draft) and self._pays()
        if self._is_drafted:
            self._compared = []
            return draft
        if draft and not self._compared:
            self._compared, self._right = [*draft, -1], 0  # the token after a draft is another in any case
        return []

    def took(self, tokens: int) -> None:
        """The step that ``draft`` began gave so many tokens."""
        seconds = self._clock() - self._started
        if self._is_drafted:
            self._waited = 0
            self._drafted.append(seconds)
            self._expect(tokens)
        else:
            self._waited += tokens
            self._plain.append(seconds)

    def _compare(self, token: int) -> None:
        if not self._compared:
            return
        if token == self._compared[self._right]:
            self._right += 1
        else:
            self._expect(self._right + 1)
            self._compared = []

    def _expect(self, tokens: int) -> None:
        self._expected += _NEWEST * (tokens - self._expected)

    def _pays(self) -> bool:
        if len(self._plain) < _LEAST_TIMES:
            return False
        if len(self._drafted) < _LEAST_TIMES:
            return self._expected >= _FIRST_TOKENS
        gain = self._expected * min(self._plain) / max(min(self._drafted), 1e-9)
        if gain >= _LEAST_GAIN:
            self._wait = _FIRST_WAIT_TOKENS
            return True
        # The times may have been those of a busy machine. That the tokens are expected is known without a trial.
        if self._expected >= _FIRST_TOKENS and self._waited >= self._wait:
            self._wait *= 2
            return True
        return False

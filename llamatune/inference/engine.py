"""Decoding engine with continuous batching: prompts share a batch, and a row that ends is given to the next prompt.

Prompts are read in ragged passes without padding, then each step gives every row a token (continuous batching, Yu et
al. 2022). A prompt is completed as it would be alone. On a GPU steps are captured, and the next one is launched before
the tokens of the last are read.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.command_options.inference import Drawing, Sampling
from llamatune.errors import Stopped
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.host_memory import give_back, reuse_freed_too
from llamatune.inference.beam_search import beam_search
from llamatune.inference.captured_steps import CapturedSteps, Launched
from llamatune.inference.completion import Completion
from llamatune.inference.last_logits import last_logits, logits_of_the_row
from llamatune.inference.new_caches import new_rows
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.inference.running_sequences import IsEnough, RunningSequence, draw_tokens
from llamatune.inference.sampling import NO_TOKEN, not_finite
from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.transformer import Transformer
from llamatune.processor import has_amx
from llamatune.seeds import derived_seed
from llamatune.shapes.generation_sizes import tokens_in_a_pass, tokens_of_a_part, with_filling
from llamatune.shapes.recurring_sizes import filled_up
from llamatune.shapes.rope_scaling import DynamicScaling


class Engine:
    """Completes the prompts that are added, at most ``rows`` at a time; with ``lookup``, a single one by drafts.

    ``switch``: the model's, where it completes some of them without its adapter. ``trains``: the model does, too. Then
    steps are not captured: they would use casts of the weights that autocast frees.
    """

    def __init__(
        self,
        model: Transformer,
        eos_ids: Collection[int],
        rows: int,
        is_enough: IsEnough | None = None,
        lookup: PromptLookup | None = None,
        switch: AdapterSwitch | None = None,
        on_event: OnEvent = ignore_event,
        trains: bool = False,
    ) -> None:
        self._without_gradients = torch.no_grad if trains else torch.inference_mode
        self._model, self._eos_ids, self._rows = model, frozenset(eos_ids), rows
        self._is_enough, self._lookup, self._switch = is_enough, lookup, switch or AdapterSwitch()
        self._element_bytes = torch.finfo(model.product_dtype).bits // 8
        self._tokens_in_a_pass = tokens_in_a_pass(model.config, self._element_bytes, model.device.type)
        self._cache = new_rows(model, rows)
        reuse_freed_too(rows * model.config.vocab_size * self._element_bytes)  # logits, which each step makes and frees
        self._running: list[RunningSequence] = []  # by their rows of the cache
        self._waiting: deque[RunningSequence] = deque()
        self._added, self._has_decoded = 0, False
        self._captured = None if trains else CapturedSteps.of(model, self._cache, self._switch, on_event)
        self._launched: Launched | None = None  # after the tokens that were read

    def add(self, prompt: Sequence[int], sampling: Drawing, draw: int = 0, adapted: bool = True) -> int:
        """Take a prompt (ids, BOS included); its number, which counts from 0. Each ``draw`` of a prompt is another.

        Not ``adapted``: it is completed without the adapter, by the switch.
        """
        generator = torch.Generator().manual_seed(derived_seed(sampling.seed, "sampling", *([draw] if draw else [])))
        self._waiting.append(RunningSequence(self._added, prompt, sampling, generator, adapted))
        self._cache.capacity = max(self._cache.capacity, len(prompt) + sampling.max_new_tokens)
        self._added += 1
        return self._added - 1

    @property
    def waiting(self) -> int:
        """Prompts that have no row yet."""
        return len(self._waiting)

    @property
    def is_done(self) -> bool:
        return not self._running and not self._waiting

    def step(self) -> list[tuple[int, Completion]]:
        """Give every running prompt a token, or read waiting ones if enough rows are free; those that ended by it.

        Before prompts are read, a step that was launched gives its tokens.
        """
        with self._without_gradients():
            return self._step(self._rows - len(self._running))

    def _step(self, free: int) -> list[tuple[int, Completion]]:
        if self._running and not self._has_decoded and self._model.device.type == "cpu":
            give_back()  # what oneDNN makes for the sizes of a pass lies between what the pass frees
        # A pass over prompts makes the others wait, so several rows are given away together.
        if self._waiting and (not self._running or free >= min(len(self._waiting), max(1, self._rows // 8))):
            return self._read(free) if self._launched is None else self._finish_launched()
        self._has_decoded = True
        if self._lookup is None or len(self._running) > 1:
            return self._next_tokens()
        (sequence,) = self._running
        if not _may_draft(self._model, sequence.sampling, self._lookup.in_16_bits):
            return self._next_tokens()
        if self._launched is not None:
            return self._finish_launched()
        before = len(sequence.chosen)
        most = sequence.sampling.max_new_tokens - before - 1
        draft = self._lookup.draft(sequence.number, sequence.prompt, sequence.chosen, most)
        ended = self._check(sequence, draft) if draft else self._plain_step()
        self._lookup.took(len(sequence.chosen) - before)
        return ended

    def _next_tokens(self) -> list[tuple[int, Completion]]:
        if self._captured is None:
            return self._plain_step()
        if self._launched is None and self._captured.suits(self._running):
            self._cache.grow()
            self._launched = self._captured.begin(self._running)
        return self._plain_step() if self._launched is None else self._finish_launched(goes_on=True)

    def _finish_launched(self, goes_on: bool = False) -> list[tuple[int, Completion]]:
        """Take the tokens of the step that was launched; if the work ``goes_on``, the next one is launched before.

        What that computes for rows that turn out to have ended is not taken. It is not launched where rows are known to
        end, by their length, nor where the cache has to grow.
        """
        launched, self._launched = self._launched, None
        assert launched is not None
        assert self._captured is not None
        if goes_on and self._cache.has_room and all(one.tokens_left > 1 for one in self._running):
            self._launched = self._captured.launch(self._running)
        return self._take(launched.tokens(), launched.sequences)

    def _plain_step(self) -> list[tuple[int, Completion]]:
        last = [sequence.chosen[-1] for sequence in self._running]
        tokens, places = torch.tensor([last, self._cache.lengths], device=self._model.device)  # (rows,) each
        layers, mask = self._cache.next_token(places)
        self._switch.set([one.adapted for one in self._running], [1] * len(last), self._model.device)
        logits = self._model(tokens[:, None], places[:, None], mask, layers, read=last_logits)
        return self._draw(logits, self._running)

    def _check(self, sequence: RunningSequence, draft: Sequence[int]) -> list[tuple[int, Completion]]:
        """Give the only sequence what ``draft`` has right, and the token behind it, by one pass over all of them."""
        ids = torch.tensor([[sequence.chosen[-1], *draft]], device=self._model.device)
        layers = self._cache.continue_last(ids.shape[1])
        self._switch.set([sequence.adapted], [ids.shape[1]], self._model.device)
        logits = self._model(ids, cache=layers, read=logits_of_the_row)
        for place, drafted in enumerate([*draft, None]):
            ended = self._draw(logits[place : place + 1], self._running)
            if ended:
                return ended
            if sequence.chosen[-1] != drafted:
                self._cache.shorten_last(len(draft) - place)
                break
        return []

    def _read(self, free: int) -> list[tuple[int, Completion]]:
        """Read the next prompts, as many as one pass takes, and draw the first token of each."""
        new = [self._waiting.popleft()]
        tokens = len(new[0].prompt)
        while self._waiting and len(new) < free and tokens + len(self._waiting[0].prompt) <= self._tokens_in_a_pass:
            new.append(self._waiting.popleft())
            tokens += len(new[-1].prompt)
        self._running += new
        # The angles of dynamic scaling depend on the length of the whole prompt.
        if tokens > self._tokens_in_a_pass and not isinstance(self._model.config.rope_scaling, DynamicScaling):
            return self._draw(self._read_long(new[0]), new)
        device = self._model.device
        lengths = [len(sequence.prompt) for sequence in new]
        ends = [end - 1 for end in itertools.accumulate(lengths)]
        filling = filled_up(tokens, device.type, self._element_bytes, has_amx()) - tokens
        twice = filled_up(len(new), device.type, self._element_bytes, has_amx()) - len(new) if len(new) > 1 else 0
        if len(new) + twice == tokens + filling:
            twice = 0  # the switch knows the rows of the last block by their number
        ends += ends[-1:] * twice  # so that the sizes of products recur
        both = torch.tensor([*(token for sequence in new for token in sequence.prompt), *ends], device=device)
        ids, rows = both[:tokens], both[tokens:]
        layers = self._cache.begin(lengths)
        self._switch.set([sequence.adapted for sequence in new], lengths, device, filling, twice)
        samples = with_filling(lengths, filling, self._model.config)
        logits = self._model(
            F.pad(ids, (0, filling))[None], cache=layers, lengths=samples, rows=rows, read=logits_of_the_row
        )
        return self._draw(logits[: len(new)], new)

    def _read_long(self, sequence: RunningSequence) -> Tensor:
        """Logits (1, V) behind a prompt of several passes."""
        prompt, logits = sequence.prompt, None
        tokens = tokens_of_a_part(len(prompt), self._tokens_in_a_pass)
        for begin in range(0, len(prompt), tokens):
            part = prompt[begin : begin + tokens]
            ids = torch.tensor([part], device=self._model.device)
            if begin == 0:
                layers = self._cache.begin([len(part)], to_come=len(prompt) - len(part))
            else:
                layers = self._cache.continue_last(len(part))
            self._switch.set([sequence.adapted], [len(part)], self._model.device)
            logits = self._model(ids, cache=layers, read=last_logits)
        assert logits is not None
        return logits  # type: ignore[no-any-return]

    def _draw(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> list[tuple[int, Completion]]:
        """Draw a token from ``logits`` (rows, V) for each of ``sequences``."""
        return self._take(draw_tokens(logits, sequences), sequences)

    def _take(self, tokens: Sequence[int], sequences: Sequence[RunningSequence]) -> list[tuple[int, Completion]]:
        """Give each of ``sequences`` that has not ended its token; the rows of those that end by it are given up."""
        ended: list[tuple[int, Completion]] = []
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence.reason:
                continue
            if token == NO_TOKEN:
                raise not_finite()
            if sequence.take(token, self._eos_ids, self._is_enough):
                ended.append((sequence.number, Completion(sequence.chosen, sequence.reason)))
        if ended:
            origin = self._cache.drop([row for row, sequence in enumerate(self._running) if sequence.reason])
            self._running = [self._running[row] for row in origin]
            if self._launched is not None and self._captured is not None:
                self._captured.move(origin)
        return ended


def completions(
    model: Transformer,
    prompts: Iterable[Sequence[int]],
    sampling: Sampling,
    eos_ids: Collection[int],
    rows: int,
    should_stop: ShouldStop = never_stop,
    is_enough: IsEnough | None = None,
    lookup: PromptLookup | None = None,
    switch: AdapterSwitch | None = None,
    on_event: OnEvent = ignore_event,
) -> Iterator[Completion]:
    """The completions of every prompt (ids, BOS included), in their order, at most ``rows`` computed at a time.

    Each prompt has ``num_return_sequences``, one after the other, and each is followed by that without the adapter if
    there is a ``switch``, the model's. Neither it nor ``is_enough`` is for beam search, which makes no drafts either.

    Raises:
        Stopped: ``should_stop`` said so, between two tokens.
    """
    if sampling.num_beams > 1:
        assert is_enough is None, "a beam is known to be the best only at its end"
        assert switch is None, "beams have the adapter"
        for prompt in prompts:
            yield from beam_search(model, prompt, sampling, eos_ids, should_stop)
        return
    draws, kinds = range(sampling.num_return_sequences), (True,) if switch is None else (True, False)
    asked = ((prompt, draw, adapted) for prompt in prompts for draw in draws for adapted in kinds)
    first = list(itertools.islice(asked, rows))
    coming = itertools.chain(first, asked)
    rows_used = len(first)  # a row takes memory, used or not
    engine = Engine(model, eos_ids, rows_used, is_enough, lookup, switch, on_event)
    ended, due = dict[int, Completion](), 0
    while True:
        for prompt, draw, adapted in itertools.islice(coming, rows - engine.waiting):
            engine.add(prompt, sampling, draw, adapted)
        if engine.is_done:
            return
        if should_stop():
            raise Stopped("stopped while generating")
        ended.update(engine.step())
        while due in ended:
            yield ended.pop(due)
            due += 1


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Collection[int],
    should_stop: ShouldStop = never_stop,
    is_enough: IsEnough | None = None,
) -> list[Completion]:
    """``completions`` of all prompts at once."""
    return list(completions(model, prompts, sampling, eos_ids, max(1, len(prompts)), should_stop, is_enough))


def _may_draft(model: Transformer, sampling: Drawing, in_16_bits: bool) -> bool:
    """Whether a pass over several tokens draws what passes over each would, but for near ties ``in_16_bits``.

    There its logits are rounded otherwise, which may change any draw. The angles of dynamic scaling depend on the
    length of a pass.
    """
    is_exact = model.product_dtype == torch.float32 or (in_16_bits and sampling.temperature == 0)
    return is_exact and not isinstance(model.config.rope_scaling, DynamicScaling)

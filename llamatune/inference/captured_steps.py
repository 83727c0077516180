"""CUDA graphs of decoding steps, by their number of rows, and tokens that are read a step later.

A step of a 7B is about a thousand kernels, and to launch them one by one takes longer than to compute them for a few
rows. A graph launches all at once. It holds addresses, so tokens and places are written to the same tensors for every
step, and each row sees its whole room in the cache through a mask (the manner of gpt-fast and nano-vLLM). All graphs
share one pool of memory: they run one after the other, and what is read of a step lies outside of it.

The buffer that quantised matrices are unpacked into has its size after the first prompts, and every pass, launched one
way or the other, leaves the same matrix in it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llamatune.events import Notice, OnEvent
from llamatune.inference.host_copies import fetched, sent
from llamatune.inference.last_logits import last_logits
from llamatune.inference.running_sequences import RunningSequence, alike
from llamatune.inference.sampling import chosen_tokens
from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.kv_cache import RowCache
from llamatune.model.transformer import Transformer
from llamatune.shapes.generation_sizes import captured_rows

Run = Callable[[], None]

_STEPS_BEFORE = 8
"""Steps of a size that are made without a graph of their own: a capture takes the time of some steps."""


class Graphs(Protocol):
    """What captures steps."""

    def capture(self, step: Run) -> Run:
        """What computes ``step`` again and again, on what its tensors then hold. It may be run meanwhile."""

    def clear(self) -> None:
        """All captured steps are given up."""


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: those that share a pool need it, and cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaGraphs:
    """Graphs of one GPU that share a pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def capture(self, step: Run) -> Run:
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self._device)
        work = torch.cuda.current_stream(self._device)
        stream.wait_stream(work)
        try:
            with torch.cuda.stream(stream):
                step()  # compiles kernels, and makes the workspaces of libraries
                # Of this thread alone: others, as NCCL's or a tracker's, may go on using the GPU.
                with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    step()
        finally:
            work.wait_stream(stream)
        return graph.replay

    def clear(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # torch does not take up one whose graphs are gone


def graphs_for(model: Transformer) -> Graphs | None:
    """Those of the model's GPU; None on a CPU, and where the host brings the blocks' weights in a pass."""
    return CudaGraphs(model.device) if model.device.type == "cuda" and not model.is_streamed else None


@dataclass(frozen=True)
class Launched:
    """A step that was begun for ``sequences``, the rows of the cache; ``tokens()`` waits for it."""

    sequences: tuple[RunningSequence, ...]
    tokens: Callable[[], list[int]]


class CapturedSteps:
    """Decoding steps of the first rows of a cache, and on the device what these go on with: tokens and their places.

    A step leaves there what the next one takes, so that it can be launched before its tokens are read.
    """

    def __init__(
        self, model: Transformer, cache: RowCache, graphs: Graphs, switch: AdapterSwitch, on_event: OnEvent
    ) -> None:
        self._model, self._cache, self._switch, self._on_event = model, cache, switch, on_event
        self._graphs: Graphs | None = graphs
        self._steps: dict[int, Run] = {}  # by their rows
        self._wanted = Counter[int]()
        self._room = 0
        # Token, place, and whether the adapter acts; valid ones of rows that are not in use, too.
        self._state = torch.zeros(3, cache.rows, dtype=torch.int64, device=model.device)
        self._logits: Tensor | None = None

    @classmethod
    def of(cls, model: Transformer, cache: RowCache, switch: AdapterSwitch, on_event: OnEvent) -> CapturedSteps | None:
        """None: where the model computes, no step is captured."""
        graphs = graphs_for(model)
        return None if graphs is None else cls(model, cache, graphs, switch, on_event)

    def suits(self, running: Sequence[RunningSequence]) -> bool:
        """Whether the tokens of these rows can be chosen without the host."""
        return running[0].sampling.repetition_penalty == 1 and alike(running)

    def begin(self, running: Sequence[RunningSequence]) -> Launched | None:
        """Launch a step after tokens that were read, in a cache with room for it; None: none is captured."""
        if self._graphs is None and not self._steps:
            return None
        if self._room != self._cache.room:
            self._steps.clear()
            if self._graphs is not None:
                self._graphs.clear()
            self._room = self._cache.room
        last, adapted = ([one.chosen[-1] for one in running], [one.adapted for one in running])
        self._state[:, : len(running)] = sent(torch.tensor([last, self._cache.lengths, adapted]), self._state.device)
        return self.launch(running)

    def launch(self, running: Sequence[RunningSequence]) -> Launched | None:
        """Launch a step after the last one, whose tokens may be unknown; None: none is captured."""
        step, count = self._step_for(len(running)), len(running)
        if step is None:
            return None
        step()
        self._cache.go_on()
        assert self._logits is not None
        tokens = chosen_tokens(self._logits[:count], running[0].sampling, [one.generator for one in running])
        self._state[0, :count] = tokens.clamp_min(0)  # where there is none, the embedding has no row for it
        self._state[1, :count] += 1
        return Launched(tuple(running), fetched(tokens))

    def move(self, origin: Sequence[int]) -> None:
        """Rows have changed places, as ``RowCache.drop`` says."""
        for place, row in enumerate(origin):
            if place != row:
                self._state[:, place] = self._state[:, row]

    def _step_for(self, rows: int) -> Run | None:
        """A step of at least so many rows; of the best number if that has been wanted for a while."""
        best = captured_rows(rows, self._cache.rows)
        self._wanted[best] += 1
        if best not in self._steps and self._wanted[best] > _STEPS_BEFORE and self._graphs is not None:
            self._capture(best)
        return self._steps.get(min((size for size in self._steps if size >= rows), default=0))

    def _capture(self, rows: int) -> None:
        """What is run for it writes the keys and values of the next step, which writes them again."""
        assert self._graphs is not None
        try:
            if self._logits is None:
                size = self._cache.rows, self._model.config.vocab_size
                self._logits = torch.zeros(size, dtype=torch.float32, device=self._state.device)
            self._steps[rows] = self._graphs.capture(lambda: self._compute(rows))
        except RuntimeError as fault:  # an allocation that fails, too
            why = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            what = f"a step of {rows} rows cannot be captured as a CUDA graph ({why})"
            self._on_event(Notice(f"{what}: tokens take longer without it", "warning"))
            self._graphs = None

    def _compute(self, rows: int) -> None:
        assert self._logits is not None
        tokens, places, adapted = self._state[:, :rows]
        places = places.clamp_max(self._cache.room - 1)  # of rows that are not in use, some ended at their room's end
        layers, mask = self._cache.fixed_step(places)
        self._switch.hold(adapted.bool())
        self._logits[:rows] = self._model(tokens[:, None], places[:, None], mask, layers, read=last_logits)

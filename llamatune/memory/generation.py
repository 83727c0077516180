"""Memory plan of generation: bytes of loading, reading prompts and decoding, their peak, and whether that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llamatune.memory import int8_products
from llamatune.memory.generation_pass import Cache, Choice, Pass, choose_beams, highest, sample, take_likeliest
from llamatune.memory.model_sizes import ModelSizes
from llamatune.processor import has_amx
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.attention_kernels import Gpu, takes_mask
from llamatune.shapes.dtypes import WEIGHT_BYTES
from llamatune.shapes.generation_sizes import (
    ROWS_AT_ONCE,
    grown_room,
    rows_that_fit,
    tokens_in_a_pass,
    with_filling,
)
from llamatune.shapes.llama_config import LlamaConfig, linear_module
from llamatune.shapes.recurring_sizes import filled_up
from llamatune.shapes.rope_scaling import DynamicScaling


@dataclass(frozen=True)
class HeldModel:
    """A model as ``generate`` holds it.

    ``dtype`` is that of the blocks' matrices, a quantised one too, ``others`` of all else, ``stored`` of the files.
    ``replaces``: the adapter puts tensors of its own instead of the base's, so that the two do not share a copy.
    """

    config: LlamaConfig
    dtype: str
    others: str
    stored: str
    adapter: AdapterSpec | None = None
    replaces: bool = False
    cuda: Gpu = False

    def sizes(self) -> ModelSizes:
        return ModelSizes(self.config, self.dtype, self.others, self.others, self.adapter, self.cuda)


@dataclass(frozen=True)
class Work:
    """What is generated: completions of up to ``new_tokens``, at most ``rows`` at once, of prompts of one length.

    ``rows`` None: as many as ``generate`` takes, by device and memory limit; a plan says which.
    ``prompts``: how many there are; None: more than rows. ``draws``: from a nucleus, else greedily. ``compare``: the
    base's completions beside those with the adapter.
    """

    prompt_tokens: int
    new_tokens: int
    rows: int | None = None
    prompts: int | None = None
    beams: int = 1
    draws: bool = True
    compare: bool = False

    @property
    def at_once(self) -> int:
        """The rows of the cache, once ``rows`` is known."""
        assert self.rows is not None
        return self.rows if self.prompts is None else min(self.rows, self.prompts)

    @property
    def is_more(self) -> bool:
        """Whether some prompts are read while the cache is full, since there are more than rows."""
        return self.prompts is None or self.prompts > self.at_once


@dataclass(frozen=True)
class GenerationBytes:
    """Bytes at a moment, by what they are.

    ``weights`` are the base, ``adapter`` LoRA's matrices; ``temporary`` what the pass, the choice of tokens or the
    loading has in flight, and the buffer that quantised matrices are unpacked into.
    """

    weights: int
    adapter: int
    keys_and_values: int
    temporary: int

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class GenerationPlan:
    """The highest moments of loading, of reading prompts and of decoding; rows at once, and a row's room at the end."""

    moments: dict[str, GenerationBytes]
    rows: int
    room_tokens: int
    limit_bytes: int | None

    @property
    def highest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name].peak)

    @property
    def memory(self) -> GenerationBytes:
        """That of the peak."""
        return self.moments[self.highest]

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit, if there is one."""
        return self.limit_bytes is None or self.memory.peak <= self.limit_bytes


def plan_generation(model: HeldModel, work: Work, limit_bytes: int | None = None) -> GenerationPlan:
    """Predict the memory of generating on one device that holds all weights."""
    z = model.sizes()
    weights = z.block * model.config.num_hidden_layers + z.other_parameters * z.w
    copies = 2 if work.compare and model.replaces else 1
    held = GenerationBytes(copies * weights, _adapter_bytes(z), 0, copies * int8_products.buffers(z))
    moments = {"loading": dataclasses.replace(held, temporary=max(0, _loading_peak(z, model) - weights))}
    if work.rows is None:
        free = None if limit_bytes is None else limit_bytes - moments["loading"].peak
        work = dataclasses.replace(work, rows=_usual_rows(model, work, free))
    rooms = _Rooms(model, work)
    for name, passes in {"reading prompts": _reading(z, work, rooms), "decoding": _decoding(z, work, rooms)}.items():
        found = highest(z, [*passes])
        captured = 4 * work.at_once * z.V if z.cuda and work.beams == 1 and (name == "decoding" or work.is_more) else 0
        temporary = held.temporary + found[1] + captured  # the logits of captured steps, in fp32
        moments[name] = dataclasses.replace(held, keys_and_values=found[0], temporary=temporary)
    return GenerationPlan(moments, work.at_once, rooms.last, limit_bytes)


def _usual_rows(model: HeldModel, work: Work, free_bytes: int | None) -> int:
    """Completions that ``generate`` computes together unasked, with so much memory beside the weights."""
    most = ROWS_AT_ONCE["cuda" if model.cuda else "cpu"]
    if free_bytes is None:
        return most
    tokens, models = work.prompt_tokens + work.new_tokens, 2 if work.compare else 1
    return min(most, rows_that_fit(model.config, WEIGHT_BYTES[model.others], tokens, work.draws, free_bytes, models))


def _adapter_bytes(z: ModelSizes) -> int:
    """Its tensors in fp32, and the norms that DoRA keeps of each matrix."""
    if z.adapter is None:
        return 0
    adapter, layers = z.adapter, range(z.config.num_hidden_layers)
    places = [(name, layer) for name in adapter.modules for layer in layers if adapter.adapts(name, layer)]
    norms = [z.config.linear_shape(name)[0] for name, _ in places] if z.dora else []
    return 4 * (sum(adapter.parameter_count(z.config, *place) for place in places) + sum(norms))


def _loading_peak(z: ModelSizes, model: HeldModel) -> int:
    """What is held while tensors are read, one after the other, with the one that is read where it is converted."""
    peak = held = 0
    for name, shape in z.config.parameter_shapes():
        count, module = math.prod(shape), linear_module(name)
        packs = z.quantized and module is not None
        held += z.packed(shape) if packs else count * z.w
        converts = packs or model.stored != model.others
        rearranged = int8_products.rearranged(z) if ".layers." in name else 0
        peak = max(peak, held + max(rearranged, count * WEIGHT_BYTES[model.stored] if converts else 0))
    return peak


class _Part(NamedTuple):
    """Tokens of a prompt that are read in one pass, the keys after it, and the room before and after it."""

    tokens: int
    keys: int
    before: int
    after: int


class _Rooms:
    """Tokens that a row of the cache has room for, as they grow while prompts are read and decoded.

    ``in_a_pass``: tokens of prompts. ``read``: the parts of the longest prompt. ``decoded``: each growth afterwards, by
    the keys that need it, and the room before and after it. ``last``: the room at the end.
    """

    def __init__(self, model: HeldModel, work: Work) -> None:
        prompt, new, beams = work.prompt_tokens, work.new_tokens, work.beams
        capacity, step = prompt + new * beams, beams
        in_parts = beams == 1 and not isinstance(model.config.rope_scaling, DynamicScaling)
        self.in_a_pass = tokens_in_a_pass(model.config, WEIGHT_BYTES[model.others], model.sizes().device)
        # The engine's parts are about equal and may be shorter, but a pass over other prompts may be as long.
        at_once = self.in_a_pass if in_parts else prompt
        self.read: list[_Part] = []
        room = 0
        for begin in range(0, prompt, at_once):
            keys, before = min(begin + at_once, prompt), room
            if keys > room:
                room = grown_room(prompt, capacity)
            is_made_before = beams == 1 and not before  # the first room, in all layers
            self.read.append(_Part(keys - begin, keys, room if is_made_before else before, room))
        self.decoded: list[tuple[int, int, int]] = []
        self.keys = prompt + step * (new - 1)
        while self.keys > room:
            keys, before = prompt + step * -(-(room + 1 - prompt) // step), room
            room = grown_room(keys, capacity)
            self.decoded.append((keys, before, room))
        self.last = room


def _cache(z: ModelSizes, work: Work, rooms: _Rooms, before: int, after: int) -> Cache:
    """With room for so many tokens in each row, and that of the model that is compared with at its largest."""

    def layer(tokens: int) -> int:
        return 2 * (work.at_once if work.beams == 1 else 1) * z.K * tokens * z.c

    beside = z.config.num_hidden_layers * layer(rooms.last) if work.compare else 0
    return Cache(layer(before), layer(after), beside)


def _reading(z: ModelSizes, work: Work, rooms: _Rooms) -> Iterator[Pass]:
    """The first prompts, and those for which there is room already: the cache is full if some were decoded before."""
    is_drawn = work.beams == 1
    together = min(work.at_once, max(1, rooms.in_a_pass // work.prompt_tokens)) if is_drawn else 1
    read = filled_up(together, z.device, z.c, has_amx()) if together > 1 else 1
    full = rooms.last if work.is_more else rooms.read[-1].after
    for part in rooms.read:
        caches = [_cache(z, work, rooms, part.before, part.after)]
        if is_drawn and (work.is_more or work.at_once > together):
            caches.append(_cache(z, work, rooms, full, full))
        lengths = (part.tokens,) * together
        filling = filled_up(sum(lengths), z.device, z.c, has_amx()) - sum(lengths)
        is_whole = is_drawn and len(rooms.read) == 1  # a part is neither filled up nor cut to what is read
        if is_whole:
            lengths = with_filling(lengths, filling, z.config)
        for cache in caches:
            if part.keys > part.tokens:
                start = part.keys - part.tokens
                masked = takes_mask(start, part.tokens, z.config.sliding_window, z.device)
                keys = part.keys if masked else 0
                yield Pass(part.tokens, 1, cache, _draw(work), keys=keys, is_part=True)
            else:
                tokens, repeated = sum(lengths), read - together
                yield Pass(tokens, read, cache, _draw(work), lengths=lengths, selects=is_whole, filling=repeated)


def _decoding(z: ModelSizes, work: Work, rooms: _Rooms) -> Iterator[Pass]:
    """Steps that need more room, and the last one."""
    tokens, rows, left = (work.at_once, work.at_once, 0) if work.beams == 1 else (work.beams, 1, work.beams)
    for keys, before, after in (*rooms.decoded, (rooms.keys, rooms.last, rooms.last)):
        cache = _cache(z, work, rooms, before, after)
        yield Pass(tokens, tokens, cache, _draw(work), rows=rows, keys=keys, left=left)


def _draw(work: Work) -> Choice:
    return choose_beams if work.beams > 1 else sample if work.draws else take_likeliest

"""Measures one cell of generation: prefill, decoding and first token of a batch, memory, the bandwidth limit."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.benchmarking.bandwidth import (
    clock,
    memory_bandwidth,
    step_weight_bytes,
    tensors_of,
    tokens_looked_at,
    weight_bytes,
)
from llamatune.benchmarking.category_meter import StorageMeter
from llamatune.benchmarking.measure_cell import resident_peak_bytes
from llamatune.benchmarking.results import sample_deviation
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.events import ignore_event, never_stop
from llamatune.inference.engine import Engine
from llamatune.inference.model_source import OpenedModel
from llamatune.model.transformer import Transformer
from llamatune.shapes.generation_sizes import token_cache_bytes
from llamatune.training.run_memory import peak_memory_bytes, peak_reserved_bytes


@dataclass(frozen=True)
class GenerationTask:
    """What to measure: ``rows`` prompts of ``prompt_tokens`` ids run together until each has ``new_tokens`` more."""

    source: ModelSource
    rows: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int

    def request(self) -> dict[str, Any]:
        """As JSON."""
        source = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(self.source).items()}
        return {"kind": "generation", **vars(self), "source": source}

    @classmethod
    def of_request(cls, request: dict[str, Any]) -> GenerationTask:
        """What ``request`` made."""
        values = {**request, "source": _source(request["source"])}
        del values["kind"]
        return cls(**values)


def _source(values: dict[str, Any]) -> ModelSource:
    adapter = values["adapter"]
    return ModelSource(**{**values, "model": Path(values["model"]), "adapter": adapter and Path(adapter)})


@dataclass(frozen=True)
class TimedBatch:
    """Seconds of a batch: until all prompts are read, from there to its end, and a row's to its first token (mean)."""

    prefill: float
    decode: float
    first_token: float


def measure_generation(task: GenerationTask, opened: OpenedModel) -> dict[str, Any]:
    """Times, memory and the bandwidth limit of a cell. Times are those of ``repetitions`` batches after a first one.

    Raises:
        OutOfMemory: on the device or on the host.
    """
    device, config, rows = opened.device, opened.config, task.rows
    cuda = device.type == "cuda"
    prompts = random_prompts(config.vocab_size, rows, task.prompt_tokens)
    with opened.computing(rows, opened.memory_advice("use fewer --rows"), ignore_event):
        model = opened.load(ignore_event, never_stop, generates=True).by_prefix[""]
        meter = StorageMeter()
        if cuda:
            torch.cuda.empty_cache()  # of what loading took
            torch.cuda.reset_peak_memory_stats(device)
        else:
            meter.hold(tensors_of(model))
        with contextlib.nullcontext() if cuda else meter:
            time_batch(model, prompts, task.new_tokens)
        timed = [time_batch(model, prompts, task.new_tokens) for _ in range(task.repetitions)]
        memory = {
            "allocated_bytes": peak_memory_bytes(device) if cuda else meter.peak_bytes,
            "reserved_bytes": peak_reserved_bytes(device),
            "resident_bytes": resident_peak_bytes(),
        }
        threads, bandwidth = torch.get_num_threads(), memory_bandwidth(device)
    cached = token_cache_bytes(config, model.product_dtype.itemsize)
    looked_at = tokens_looked_at(config, task.prompt_tokens, task.new_tokens)
    read = step_weight_bytes(model, rows) + rows * looked_at * cached
    prefill = [rows * task.prompt_tokens / batch.prefill for batch in timed]
    decode = [rows * (task.new_tokens - 1) / batch.decode for batch in timed]
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_deviation": sample_deviation(prefill),
        "decode_tokens_per_second": statistics.median(decode),
        "decode_deviation": sample_deviation(decode),
        "first_token_s": statistics.median(batch.first_token for batch in timed),
        "first_token_deviation_s": sample_deviation([batch.first_token for batch in timed]),
        **memory,
        "weights_bytes": weight_bytes(model),
        "cache_bytes": rows * (task.prompt_tokens + task.new_tokens - 1) * cached,
        "step_read_bytes": round(read),
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_fraction": statistics.median(decode) / rows * read / bandwidth,
        "seconds": [dataclasses.asdict(batch) for batch in timed],
        "held_in": opened.dtype_name,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": threads,
        "torch": torch.__version__,
    }


def random_prompts(vocab_size: int, rows: int, tokens: int) -> list[list[int]]:
    """Ids drawn from the whole vocabulary; the same in every process."""
    chance = random.Random(0)
    return [[chance.randrange(vocab_size) for _ in range(tokens)] for _ in range(rows)]


def time_batch(model: Transformer, prompts: Sequence[Sequence[int]], new_tokens: int) -> TimedBatch:
    """Complete the prompts greedily, all in one engine, without an EOS: every row has all its tokens.

    Passes that read prompts are prefill, and give each row its first token. The rest is decoding.
    """
    engine, device = Engine(model, (), len(prompts)), model.device
    for prompt in prompts:
        engine.add(prompt, Sampling(new_tokens, temperature=0))
    started = now = clock(device)
    prefill = until_first = 0.0
    while engine.waiting:
        before, waiting = now, engine.waiting
        engine.step()
        now = clock(device)
        if read := waiting - engine.waiting:
            prefill += now - before
            until_first += read * (now - started)
    while not engine.is_done:
        engine.step()
    return TimedBatch(prefill, clock(device) - started - prefill, until_first / len(prompts))

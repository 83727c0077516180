"""Times whole training steps, alternating in one process: llamatune with one or more specs, and a peer.

``python benchmarks/steps.py SETTINGS.json``; rows are equal and without padding, or those of a prepared directory. The
last line on stdout is a JSON object: seconds and losses of each side, the ratios of paired rounds (second side over
first), and the peak memory of the process.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import peaks, timed
from drawn_base import drawing_on_device, forget_base, start_of
from material import DTYPES
from step_meter import even_batch
from torch import Tensor

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.data.batches import Batch, open_prepared
from llamatune.devices import choose_device
from llamatune.events import ignore_event, never_stop
from llamatune.model.compiled_functions import compiling
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.shapes.counts import count_parameters
from llamatune.spec import build_spec
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import build_learner
from llamatune.training.training_step import make_update

Step = Callable[[int], float]
"""Makes one update, given the window's number from 0, and returns its loss."""


def llamatune_step(values: dict[str, Any], batches: list[Batch]) -> tuple[Step, int]:
    """The training loop's functions on the benchmark's batches; with the number of trained parameters."""
    values, start = start_of(values)
    spec = build_spec(values, "benchmark")
    training, device = spec.training, choose_device(spec.training.device)
    # A base without weights is drawn on the device; one that is not quantised is shared with a peer.
    checkpoint = None if spec.model.init == "random" else open_checkpoint(Path(spec.model.path))
    whole = checkpoint.config if checkpoint else read_config(Path(spec.model.path))
    config = whole.with_layers(spec.model.num_layers)
    dtype = DTYPES[training.precision][1]
    shared = dtype if spec.model.dtype == DTYPES[training.precision][0] else None
    data: Any = None
    count = count_parameters(config, spec.adapter)
    if spec.lora is not None and spec.lora.init_from is not None:
        start = load_adapter(Path(spec.lora.init_from))
    inputs = Inputs(config, checkpoint, "", data, None, start, {}, count, device)
    with drawing_on_device(device, shared):
        learner = build_learner(spec, inputs, ignore_event, never_stop)

    def step(window: int) -> float:
        with compiling(training.compile), chosen_kernels(training.kernels, device):
            batch = batches[window % len(batches)]
            return make_update(learner, [batch], training, window, training.rate).loss

    return step, sum(parameter.numel() for parameter in learner.parameters.values())


def peer_step(settings: dict[str, Any], ids: Tensor, labels: Tensor) -> tuple[Step, int]:
    """A plain step: forward with labels, backward, clip, fused AdamW; with the number of trained parameters."""
    from training_peers import load

    peer, device = load(settings), settings["device"]
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings["learning_rate"], weight_decay=0.0, fused=True)

    def step(window: int) -> float:
        loss = peer.loss(ids.to(device), labels.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, sum(parameter.numel() for parameter in trained)


def batches_of(settings: dict[str, Any]) -> tuple[list[Batch], Tensor, Tensor]:
    """llamatune's batches, and a peer's ids and labels (empty for rows of a prepared directory)."""
    if settings.get("prepared"):
        split, size = open_prepared(Path(settings["prepared"])).train, settings["rows"]
        batches = [split.batch(list(range(i, min(i + size, len(split))))) for i in range(0, len(split), size)]
        return batches, torch.empty(0), torch.empty(0)
    rows, tokens = settings["rows"], settings["row_tokens"]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, settings["vocab_size"], (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens - max(1, round(tokens * settings["target_share"]))] = -100
    return [even_batch(rows, tokens, settings["target_share"], ids)], ids, labels


def makers(settings: dict[str, Any]) -> dict[str, Callable[[], tuple[Step, int]]]:
    """What builds each side."""
    batches, ids, labels = batches_of(settings)
    sides: dict[str, Callable[[], tuple[Step, int]]] = {
        name: partial(llamatune_step, spec, batches) for name, spec in settings["ours"].items()
    }
    if settings["theirs"] is not None:
        sides[settings["theirs"]["peer"]] = partial(peer_step, settings["theirs"], ids, labels)
    return sides


def peaks_alone(make: Callable[[], tuple[Step, int]]) -> dict[str, int | None]:
    """Peaks of a later step of one side, with no other in memory (CUDA)."""
    step, _ = make()
    step(0)
    empty_device()
    step(1)
    return peaks(True)


def empty_device() -> None:
    """Give back what no tensor holds, and measure the peaks anew from here."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """The report on what the settings name; ``alone``: with the peaks of each side alone, by its name."""
    cuda, build = settings["device"] != "cpu", makers(settings)
    alone = {}
    for name, make in build.items() if settings.get("alone") and cuda else ():
        forget_base()  # of this side's memory it is a part only where the side draws it
        alone[name] = peaks_alone(make)
        empty_device()
    sides = {name: make() for name, make in build.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for window in range(settings["warm_up"] + settings["rounds"]):
        order = list(sides) if window % 2 else list(sides)[::-1]
        for name in order:
            took, loss = timed(partial(sides[name][0], window), cuda)
            losses[name].append(loss)
            seconds[name].append(took)
    steady = {name: values[settings["warm_up"] :] for name, values in seconds.items()}
    report: dict[str, Any] = {
        "step_s": {name: statistics.median(values) for name, values in steady.items()},
        "seconds": steady,
        "first_step_s": {name: values[0] for name, values in seconds.items()},
        "losses": losses,
        "trainable_parameters": {name: side[1] for name, side in sides.items()},
        "alone": alone,
        **peaks(cuda),
    }
    if len(sides) == 2:
        first, second = steady.values()
        report["ratios"] = [b / a for a, b in zip(first, second, strict=True)]
    return report


def main() -> None:
    """Measure what the settings name and report."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps(measure(settings)) + "\n")


if __name__ == "__main__":
    main()

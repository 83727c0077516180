"""Whole training steps on equal rows without padding, llamatune and transformers + PEFT in turns in one process.

``python benchmarks/dense_steps.py SETTINGS.json``; the last line on stdout is a JSON object: each side's seconds and
losses, the paired rounds' ratios, and the process's memory, which is a side's own where it runs alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamatune.accounting import count_parameters
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.data.dataset import Batch
from llamatune.events import ignore_event, never_stop
from llamatune.spec import build_spec
from llamatune.training.memory_gate import even_batch
from llamatune.training.setup import Inputs, build_learner
from llamatune.training.window import accumulate_gradient, make_update

Step = Callable[[int], float]
"""One update with the window's number, from 0; its loss."""


def llamatune_step(settings: dict[str, Any], batch: Batch) -> tuple[Step, int]:
    """The loop's own functions on the benchmark's batch."""
    spec = build_spec(settings["spec"], "benchmark")
    checkpoint, lora = open_checkpoint(Path(settings["base"])), spec.lora
    assert lora is not None
    count = count_parameters(checkpoint.config, lora.r, lora.target_modules)
    data: Any = None
    inputs = Inputs(checkpoint.config, checkpoint, "", data, None, None, {}, count, torch.device(settings["device"]))
    learner = build_learner(spec, inputs, ignore_event, never_stop)

    def step(window: int) -> float:
        gradient = accumulate_gradient(learner, [batch], 0, window)
        make_update(learner, gradient, spec.training.learning_rate, spec.training.max_grad_norm)
        return gradient.loss

    return step, sum(parameter.numel() for parameter in learner.parameters.values())


def peft_step(settings: dict[str, Any], rows: list[list[int]], labels: list[list[int]]) -> tuple[Step, int]:
    """What Trainer does in a step, without its loop: forward with labels, backward, clip, fused AdamW."""
    from side_trainer import load_peer

    model = load_peer(settings)
    model.train()
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = settings["spec"]["training"]
    optimizer = torch.optim.AdamW(trained, training["learning_rate"], weight_decay=0.0, fused=True)
    ids, targets = torch.tensor(rows), torch.tensor(labels)

    def step(window: int) -> float:
        on_device = ids.to(settings["device"])
        with torch.autocast(settings["device"], torch.bfloat16, enabled=settings["autocast"]):
            loss = model(input_ids=on_device, labels=targets.to(settings["device"]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, sum(parameter.numel() for parameter in trained)


def timed(step: Step, window: int, cuda: bool) -> tuple[float, float]:
    """Seconds and loss of one step, the device waited for."""
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    loss = step(window)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, loss


def main() -> None:
    """Measure as the settings say and report."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows, tokens, cuda = settings["rows"], settings["row_tokens"], settings["device"] != "cpu"
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, settings["vocab_size"], (rows, tokens), generator=generator)
    batch = even_batch(rows, tokens, settings["target_share"], ids)
    first_target = tokens - max(1, round(tokens * settings["target_share"]))
    labels = ids.clone()
    labels[:, :first_target] = -100
    makers: dict[str, Callable[[], tuple[Step, int]]] = {
        "llamatune": lambda: llamatune_step(settings, batch),
        "peft": lambda: peft_step(settings, ids.tolist(), labels.tolist()),
    }
    sides = {name: makers[name]() for name in settings["sides"]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for window in range(settings["warm_up"] + settings["rounds"]):
        order = list(sides) if window % 2 else list(sides)[::-1]
        for name in order:
            took, loss = timed(sides[name][0], window, cuda)
            losses[name].append(loss)
            if window >= settings["warm_up"]:
                seconds[name].append(took)
    report: dict[str, Any] = {
        "step_s": {name: statistics.median(values) for name, values in seconds.items()},
        "losses": losses,
        "trainable_parameters": {name: side[1] for name, side in sides.items()},
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }
    if len(sides) == 2:
        pairs = zip(seconds["peft"], seconds["llamatune"], strict=True)
        report["ratios"] = [theirs / ours for theirs, ours in pairs]
        report["ratio"] = statistics.median(report["ratios"])
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

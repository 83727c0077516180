"""A training run with transformers and PEFT alone: what llamatune's loop must come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

Row = tuple[list[int], list[int]]


def kept_rows(prepared: Path, split: str = "train") -> list[Row]:
    """(ids, labels) of every row that prepare-data kept, straight from its tensors."""
    tensors = load_file(prepared / f"{split}.safetensors")
    ids, mask, offsets = tensors["input_ids"].tolist(), tensors["loss_mask"].tolist(), tensors["offsets"].tolist()
    return [
        (ids[start:end], [i if m else -100 for i, m in zip(ids[start:end], mask[start:end], strict=True)])
        for start, end in itertools.pairwise(offsets)
    ]


def collate(rows: Iterable[Row]) -> dict[str, Tensor]:
    """Right-padded batch with an attention mask, as transformers takes it; padding has an id that means something."""
    rows = list(rows)
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [7] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }


def summed_cross_entropy(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Over all target tokens of a batch, each predicted from the position before it."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predicted, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return F.cross_entropy(predicted, labels, ignore_index=-100, reduction="sum")


def schedule_value(kind: str, peak: float, floor: float, warmup: int, total: int, step: int) -> float:
    """The learning rate of update ``step`` (from 1) of ``total``."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / (total - warmup)
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]
    return peak if kind == "constant" else floor + (peak - floor) * fall


@dataclass
class Trace:
    """What a run says of each step, and the trained tensors it ends with."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict)


def reference_run(
    model: torch.nn.Module,
    rows: list[Row],
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    rate: Callable[[int], float],
    steps: int,
    max_grad_norm: float | None,
    micro_batch_size: int,
    accumulation: int,
) -> Trace:
    """Rows in their order, epoch after epoch; a window at an epoch's end may be a partial one."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(list(trained.values()))
    trace, window_rows = Trace(), micro_batch_size * accumulation
    windows = [rows[start : start + window_rows] for start in range(0, len(rows), window_rows)]
    model.train()
    for step in range(1, steps + 1):
        window = windows[(step - 1) % len(windows)]
        targets = sum(label != -100 for _, labels in window for label in labels)
        loss = 0.0
        for start in range(0, len(window), micro_batch_size):
            part = summed_cross_entropy(model, collate(window[start : start + micro_batch_size])) / targets
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append(loss)
        trace.grad_norms.append(float(norm))
        trace.learning_rates.append(rate(step))
    trace.trained = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return trace

"""One epoch with transformers' Trainer and PEFT: ``python benchmarks/side_trainer.py SETTINGS.json``.

The last line on stdout is a JSON object like that of side_llamatune.py.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench import peaks
from material import Row, padded, read_rows
from torch.utils.data import SequentialSampler
from training_peers import peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class Rows(torch.utils.data.Dataset):
    """Rows as the Trainer's data set."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index].input_ids, "labels": self.rows[index].labels}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest row."""
    ids, labels = padded([Row(**row) for row in rows])
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


class InOrder:
    """A Trainer that visits the rows in file order, so that both sides see the same windows.

    ``by_length``: grouped by length.
    """

    by_length = False
    args: TrainingArguments
    train_dataset: Any

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
        if self.by_length:
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
            return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)
        return SequentialSampler(self.train_dataset)


class TrainerInOrder(InOrder, Trainer):
    """transformers' Trainer, in file order."""


class Clock(TrainerCallback):
    """Records when training began and when each update was made; writes ``step=1`` to stderr after the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())
        if len(self.times) == 2:
            sys.stderr.write("step=1\n")
            sys.stderr.flush()


def arguments(
    settings: dict[str, Any], kind: type[TrainingArguments] = TrainingArguments, **more: Any
) -> TrainingArguments:
    """Constant rate, no decay, token-weighted loss, as on llamatune's side."""
    values: dict[str, Any] = {
        "output_dir": settings["output"],
        "num_train_epochs": settings["num_epochs"],
        "max_steps": settings.get("max_steps", -1),
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": settings["autocast"],
        "gradient_checkpointing": settings["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": settings["device"] == "cpu",
        "dataloader_pin_memory": settings["device"] != "cpu",
        "seed": 0,
        **more,
    }
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in values.items() if name in known})


def run(trainer: Any, clock: Clock, settings: dict[str, Any]) -> None:
    """Train, and write the report to stdout."""
    trainer.by_length = settings["by_length"]
    trainer.train()
    report = {
        "loop_s": clock.times[-1] - clock.times[0],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        **peaks(settings["device"] != "cpu"),
    }
    sys.stdout.write(json.dumps(report) + "\n")


def main() -> None:
    """Train and report."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows, clock = Rows(read_rows(Path(settings["prepared"]))), Clock()
    trainer = TrainerInOrder(
        model=peft_model(settings),
        args=arguments(settings),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[clock],
    )
    run(trainer, clock, settings)


if __name__ == "__main__":
    main()

"""One epoch with TRL's SFTTrainer and PEFT: ``python benchmarks/side_sft.py SETTINGS.json``.

The loss is taken in chunks of supervised positions (``loss_type: nll``, its default since TRL 1.7). The last line on
stdout is a JSON object like that of side_llamatune.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from material import read_rows
from side_trainer import Clock, InOrder, arguments, run
from training_peers import peft_model
from transformers import LlamaTokenizer
from trl import SFTConfig, SFTTrainer


class SFTTrainerInOrder(InOrder, SFTTrainer):
    """TRL's SFTTrainer, in file order."""


def main() -> None:
    """Train and report."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    rows, clock = read_rows(Path(settings["prepared"])), Clock()
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    trainer = SFTTrainerInOrder(
        model=peft_model(settings),
        args=arguments(settings, SFTConfig, max_length=None, loss_type="nll", padding_free=settings["padding_free"]),
        train_dataset=Dataset.from_dict(columns),
        processing_class=LlamaTokenizer.from_pretrained(settings["base"]),
        callbacks=[clock],
    )
    run(trainer, clock, settings)


if __name__ == "__main__":
    main()

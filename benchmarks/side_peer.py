"""One epoch with torchtune's or litgpt's model and loss: ``python benchmarks/side_peer.py SETTINGS.json``.

Their recipes read only their own data sets, so the loop is written here: the same windows of rows, padded to the
longest of a micro-batch, weighted by target tokens, fused AdamW. The last line on stdout is a JSON object like that of
side_llamatune.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from bench import peaks
from material import padded, read_rows
from torch.nn.utils import clip_grad_norm_
from training_peers import load


def main() -> None:
    """Train and report."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    device, size = settings["device"], settings["micro_batch"]
    rows, peer = read_rows(Path(settings["prepared"])), load(settings)
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings["learning_rate"], weight_decay=0.0, fused=True)
    losses, window = [], size * settings["accumulation"]
    started = time.monotonic()
    for _ in range(settings["num_epochs"]):
        for first in range(0, len(rows), window):
            batches = [padded(rows[i : i + size]) for i in range(first, min(first + window, len(rows)), size)]
            counts = [int((labels[:, 1:] != -100).sum()) for _, labels in batches]
            total = torch.zeros((), device=device)
            for (ids, labels), count in zip(batches, counts, strict=True):
                loss = peer.loss(ids.to(device), labels.to(device)) * (count / sum(counts))
                loss.backward()
                total += loss.detach()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(total))
    report = {
        "loop_s": time.monotonic() - started,
        "losses": losses,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        **peaks(device != "cpu"),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

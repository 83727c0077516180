"""One rank of real processes: trains the given specs, one after another, and leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llamatune.process_group import connected
from llamatune.spec import load_spec
from llamatune.training.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    with connected("cpu", 60.0) as ranks:
        for path in sys.argv[1:]:
            train(load_spec(Path(path)), ranks=ranks)

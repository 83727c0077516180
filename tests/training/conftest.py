"""What tests of ranks share: ragged rows, a spec, and a parent that forks ranks without the seconds of an import."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rank_tools import run_ranks
from run_tools import spec_values
from warm import Warm

ROWS = 91
"""In windows of 8 rows: the last one of an epoch has 3, which are 2 micro-batches, fewer than 3 or 4 ranks."""
WORDS = "a red llama walks over green hills and counts nine blue apples while cold rain falls on old stones".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory, prepared: Callable[..., Path]) -> Callable[[int], Path]:
    """So many prepared rows of ragged lengths."""
    scratch = tmp_path_factory.mktemp("ragged")

    def make(count: int) -> Path:
        path, chance = scratch / f"{count}.jsonl", random.Random(count)
        if not path.exists():
            with path.open("w") as file:
                for _ in range(count):
                    prompt, completion = (chance.choices(WORDS, k=chance.randint(1, most)) for most in (8, 12))
                    row = {"prompt": f"{' '.join(prompt)}:", "completion": f" {' '.join(completion)}"}
                    file.write(json.dumps(row) + "\n")
        return prepared(rows=path, skip_bad_rows=0)

    return make


@pytest.fixture(scope="session")
def rank_job(
    tmp_path_factory: pytest.TempPathFactory, small_base: Path, rows_of: Callable[[int], Path]
) -> Callable[..., list[str]]:
    """The command line that trains with some changes, apart from where."""

    def write(rows: int = ROWS, **changes: Any) -> list[str]:
        settings = {
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
            "training__micro_batch_size": 2, "training__gradient_accumulation_steps": 4,
            "training__tokens_per_pass": None, "training__save_every_steps": 5, "training__rank_timeout_s": 30.0,
            "data__validation": str(rows_of(13)), "evaluation__every_steps": 6, **changes,
        }  # fmt: skip
        path = tmp_path_factory.mktemp("spec") / "run.yaml"
        path.write_text(yaml.safe_dump(spec_values(small_base, rows_of(rows), Path("nowhere"), **settings)))
        return ["train", str(path), "--json"]

    return write


@pytest.fixture(scope="session")
def warm_ranks(tmp_path_factory: pytest.TempPathFactory, rank_job: Callable[..., list[str]]) -> Iterator[Warm]:
    scratch = tmp_path_factory.mktemp("warm")
    first = [*rank_job(), f"training.output_dir={scratch / 'run'}"]
    parent = Warm([first], scratch, ("torch.distributed.fsdp", "torch._dynamo"))  # for full fine-tuning on ranks
    yield parent
    parent.close()


@pytest.fixture
def trained(warm_ranks: Warm, tmp_path: Path, rank_job: Callable[..., list[str]]) -> Callable[..., Path]:
    """The run directory of a spec with some changes, trained on so many ranks."""

    def train(size: int, changes: dict[str, Any] | None = None, name: str = "run", **how: Any) -> Path:
        run = tmp_path / f"{name}-{size}"
        run_ranks(warm_ranks, [*rank_job(**(changes or {})), f"training.output_dir={run}"], size, **how)
        return run

    return train


@pytest.fixture(scope="session")
def alone(
    tmp_path_factory: pytest.TempPathFactory, warm_ranks: Warm, rank_job: Callable[..., list[str]]
) -> Callable[..., Path]:
    """The run directory of a spec with some changes, trained by one process; each is made once."""
    made: dict[str, Path] = {}

    def train(changes: dict[str, Any] | None = None, **how: Any) -> Path:
        key = repr((changes, how))
        if key not in made:
            run = made[key] = tmp_path_factory.mktemp("alone") / "run"
            run_ranks(warm_ranks, [*rank_job(**(changes or {})), f"training.output_dir={run}"], 1, **how)
        return made[key]

    return train

"""Killed at random moments, again and again, a run ends in the bytes of one that was never disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, leftovers, training
from warm import Warm

LARGE = {"lora": {"r": 64, "alpha": 64, "dropout": 0.1, "target_modules": "all-linear"}}
FIRST_SCALE = 2.0**26
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "packed": {
        "data__packing": True, "data__packed_tokens": 60, "training__gradient_accumulation_steps": 1,
        "training__max_steps": 6,
    },
    "fp16 with overflows": {"training__precision": "fp16", "training__max_steps": 6},
    "nf4 with a cache, 8-bit": {
        "model__dtype": "nf4", "model__quantized_cache": "{place}", "training__precision": "bf16",
        "training__optimizer": "adamw_8bit", **LARGE,
    },
    "8-bit, saved at odd steps": {
        "training__optimizer": "adamw_8bit", "training__save_every_steps": 3, "training__max_steps": 8, **LARGE,
    },
    "sgd with momentum": {"training__optimizer": "sgd", "training__momentum": 0.8, "training__lr_scheduler": "cosine"},
    "every parameter": {"lora": None, "training__learning_rate": 1e-3, "evaluation__every_steps": 1},
    **{
        f"recomputing {mode}": {"training__activation_checkpointing": mode, **more}
        for mode, more in (
            ("block", {}), ("every_2", {}), ("attention", {}), ("feed_forward", {}), ("sublayer", {"lora": None}),
        )
    },
}  # fmt: skip
Tell = Callable[[str], None]
KILLS_A_RUN = 6


@pytest.fixture(scope="module")
def job_of(job_file: Callable[..., tuple[str, ...]]) -> Callable[[str], Job]:
    def make(name: str) -> Job:
        settings = {"training__learning_rate": 0.02, **SETTINGS[name]}
        more = ("model.quantized_cache={place}/cache",) if "model__quantized_cache" in settings else ()
        return training((*job_file(**settings), *more), FIRST_SCALE if "fp16" in name else None)

    return make


def killed_at_random(warm: Warm, job: Job, scratch: Path, kills: int, seed: int) -> str:
    """Runs that are each killed a few times and then left to end, until so many processes have been killed."""
    chance = random.Random(seed)
    (scratch / "whole").mkdir()
    undisturbed = warm.run(job.arguments(scratch / "whole"), loss_scale=job.loss_scale)
    assert undisturbed.code == 0, undisturbed.stderr
    expected = job.product(scratch / "whole")
    assert job.loss_scale is None or expected["summary"]["skipped_windows"], "nothing overflowed"
    done = runs = 0
    while done < kills:
        place = scratch / f"run-{runs}"
        place.mkdir()
        runs += 1
        for left in range(min(KILLS_A_RUN, kills - done), -1, -1):
            moment = chance.uniform(0, undisturbed.wall_s) if left else None
            ended = warm.run(job.arguments(place), kill_after_s=moment, loss_scale=job.loss_scale)
            if ended.code == 0:
                break
            assert ended.code == -9, ended.stderr
            done += 1
        assert ended.code == 0
        assert job.product(place) == expected, f"run {runs} of seed {seed}: another outcome after {done} kills"
        assert leftovers(place) == []
    return f"{done} kills in {runs} runs, and one outcome"


@pytest.mark.parametrize("name", ["as it comes", "fp16 with overflows", "nf4 with a cache, 8-bit"])
def test_a_few_random_kills_change_nothing(
    warm: Warm, job_of: Callable[[str], Job], tmp_path: Path, name: str, tell: Tell
) -> None:
    tell(killed_at_random(warm, job_of(name), tmp_path, 8, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_thousand_random_kills_change_nothing(
    warm: Warm, job_of: Callable[[str], Job], tmp_path: Path, name: str, tell: Tell
) -> None:
    tell(killed_at_random(warm, job_of(name), tmp_path, -(-1000 // len(SETTINGS)), seed=2))

from __future__ import annotations
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
from run_tools import metrics

Trained = Callable[..., Path]
FULL = {
    "lora": None,
    "training__learning_rate": 1e-2,
    "training__max_steps": 6,
    "evaluation__every_steps": 3,
    "training__save_every_steps": 2,
}
RULES = {
    "sgd": {"training__optimizer": "sgd", "training__momentum": 0.9},
    "adamw": {"training__optimizer": "adamw"},
    "adamw_8bit": {"training__optimizer": "adamw_8bit"},
}


@pytest.mark.parametrize("rule", RULES)
def test_x(trained: Trained, alone: Trained, rule):
    ch = {**FULL, **RULES[rule]}
    exp = alone(ch)
    for size in (2, 4, 3):
        found = trained(size, ch)
        for kind in ("step", "eval"):
            for key in ("loss", "grad_norm"):
                a = [s.get(key) for s in metrics(found, kind)]
                b = [s.get(key) for s in metrics(exp, kind)]
                if a[0] is None:
                    continue
                print(rule, size, kind, key, max(abs(x / y - 1) for x, y in zip(a, b, strict=True)))
        from safetensors.torch import load_file

        for d in ("best", "model"):
            m1, m2 = (load_file(p / d / "model.safetensors") for p in (found, exp))
            print(
                d,
                max(((m1[k] - m2[k]).norm() / m2[k].norm()).item() for k in m1),
                [f.name for f in sorted((found / "checkpoints/step-000006").iterdir())],
            )

"""A loss, gradient or weight that is not finite, as an error that says what to change in the spec."""

from __future__ import annotations

from pathlib import Path

from llamatune.errors import NumericsError
from llamatune.shapes.dtypes import PRECISIONS
from llamatune.spec import RunSpec


def numerics_fault(
    what: str, rows: object, spec: RunSpec, steps: int, run: Path, last_checkpoint: Path | None
) -> NumericsError:
    """``what`` came after so many ``steps`` of a run in the directory ``run``, ``rows`` being those of the window."""
    among = f", among {rows}" if rows else ""
    last = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "nothing was saved"
    where = f"{what} at step {steps + 1}{among} ({spec.model.dtype} weights, {spec.training.precision})"
    return NumericsError(where, run, f"{last}; {_what_helps(spec, steps)}")


def _what_helps(spec: RunSpec, steps: int) -> str:
    """Changes that the spec does not have yet. Before the first step no learning rate has done anything."""
    training = spec.training
    changes = ["lower training.learning_rate"] if steps else []
    if PRECISIONS[training.precision] != "float32":
        changes.append("set training.precision: fp32")
    if steps and training.max_grad_norm is None:
        changes.append("set training.max_grad_norm: 1.0")
    started = "model.path" if spec.lora is None or spec.lora.init_from is None else "model.path and lora.init_from"
    return " or ".join(changes) or f"see whether the weights of {started} are broken"

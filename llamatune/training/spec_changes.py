"""Changes of the spec between two starts of a run: which fields may change, which only make the run longer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError, SpecError
from llamatune.formats.origin_json import read_origin
from llamatune.spec import RunSpec, load_stored_spec
from llamatune.spec_sections import DEFAULT_EPOCHS, TrackingSection
from llamatune.training.run_file_names import ORIGIN, SPEC

MAY_CHANGE = (
    "training.log_every_steps",
    "training.log_layer_grad_norms",
    "training.profile_steps",
    "training.keep_last",
    "training.output_dir",
    # Recomputation, memory mapping and where the base lies change no bit of the result.
    "training.activation_checkpointing",
    "training.memory_limit",
    "training.rank_timeout_s",
    "training.max_time",
    "evaluation.prompts",
    "evaluation.max_new_tokens",
    "evaluation.at_start",  # which a run that goes on has behind it
    "model.memory_map",
    "model.verify",
    "model.placement",
    *(f"tracking.{name}" for name in TrackingSection.model_fields),
)
EPOCHS, STEPS = "training.num_epochs", "training.max_steps"
MAY_GROW = (EPOCHS, STEPS)
PATIENCE = "evaluation.early_stopping_patience"
RATE = "training.learning_rate"
LEAST_GAIN = "evaluation.early_stopping_min_delta"


def _is_growth(field: str, was: Any, now: Any, after: Mapping[str, Any]) -> bool:
    """Whether a change only makes a run longer: what was computed so far stays valid."""
    if field in MAY_GROW:
        return was is not None and now is not None and bool(now > was)
    if field == PATIENCE:
        return was is not None and (now is None or now > was)
    return field == LEAST_GAIN and after[PATIENCE] is None  # without patience it has no effect


def _flat(spec: RunSpec) -> dict[str, Any]:
    """Every value by its key path, the default number of epochs written out."""
    values = spec.flat()
    if values[EPOCHS] is None and values[STEPS] is None:
        values[EPOCHS] = DEFAULT_EPOCHS
    return values


def accepted_changes(
    path: Path, spec: RunSpec, inputs: Mapping[str, Any], allowed: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The allowed changes of the run's spec that alter its result.

    Raises:
        SpecError: other fields of the spec changed. CheckpointError: the base or the data did.
    """
    before, after, origin = _flat(load_stored_spec(path / SPEC)), _flat(spec), read_origin(path / ORIGIN)
    found = None if origin.search is None else origin.search.learning_rate
    refused, accepted = [], []
    for field in sorted(before.keys() | after.keys()):
        was, now = before.get(field), after.get(field)
        if was == now or field in MAY_CHANGE or (field == RATE and {was, now} == {"auto", found}):
            continue
        if field in allowed or _is_growth(field, was, now, after):
            accepted.append({"field": field, "old": was, "new": now})
        else:
            refused.append(f"{field}: {was} -> {now}")
    if refused:
        allowing = " ".join(f"--allow-spec-change {change.partition(':')[0]}" for change in refused)
        if len(refused) > 3:
            allowing = "--allow-spec-change FIELD for each"
        raise SpecError(
            "the spec differs from the run's: " + "; ".join(refused),
            path / SPEC,
            f"restore it, choose another training.output_dir, or pass {allowing}",
        )
    began = origin.inputs
    if changed := [f"{key}: {began.get(key)} -> {inputs[key]}" for key in inputs if began.get(key) != inputs[key]]:
        what = "the run was started on something else: " + "; ".join(changed)
        raise CheckpointError(what, path / ORIGIN, "choose another training.output_dir")
    return accepted

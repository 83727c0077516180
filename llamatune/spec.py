"""The run spec: what its sections must agree on; reading it from YAML with overrides. No torch.

Errors are reported together.
"""

from __future__ import annotations

import copy
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from llamatune.errors import SpecError
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.spec_faults import describe_faults
from llamatune.spec_overrides import (
    COMMAND_LINE,
    caused_by,
    drop_rivals,
    overridden_field,
    override,
    refuse_twice,
    rename_aliases,
)
from llamatune.spec_sections import (
    FULL_LEARNING_RATE,
    LORA_LEARNING_RATE,
    DataSection,
    EvaluationSection,
    LoraSection,
    ModelSection,
    Section,
    TrackingSection,
    TrainingSection,
)
from llamatune.spec_types import STORED
from llamatune.strict_yaml import read_yaml


class RunSpec(Section):
    """Everything that decides what a training run computes."""

    model: ModelSection
    lora: LoraSection | None = Field(None, description="omit the section to train every parameter")
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _agree(self) -> RunSpec:
        model, lora, training = self.model, self.lora, self.training
        if lora is None and model.dtype in QUANTIZED_DTYPES:
            fault = f"{model.dtype} weights are frozen and nothing would be trained"
            raise ValueError(f"{fault}; add a lora section, or set model.dtype: float32")
        if lora is None and model.placement in ("host", "shard"):
            fault = f"model.placement: {model.placement} is for frozen weights; add a lora section, or set it to device"
            raise ValueError(fault)
        if model.quantized_cache is not None and (model.dtype not in QUANTIZED_DTYPES or model.init == "random"):
            fault = "model.quantized_cache is for model.dtype: nf4, float8 or int8, and pretrained weights"
            raise ValueError(f"{fault}; leave it out")
        if lora is None and model.dtype != "float32":
            raise ValueError(
                f"training every parameter in {model.dtype} loses small updates; without a lora section set "
                "model.dtype: float32 (training.precision may still be bf16 or fp16)"
            )
        if training.activation_checkpointing == "projections" and (lora is None or not training.fused):
            raise ValueError(
                "activation_checkpointing: projections is for a lora section and training.fused: true; "
                "the plain modules have sublayer and block"
            )
        if lora is not None and model.init == "random" and lora.init_from:
            raise ValueError("lora.init_from needs the base it was trained on, not model.init: random")
        if training.learning_rate is None and training.min_learning_rate > self.usual_learning_rate:
            fault = f"training.min_learning_rate {training.min_learning_rate} is above learning_rate"
            raise ValueError(f"{fault} {self.usual_learning_rate}, the default; give training.learning_rate")
        return self

    @property
    def usual_learning_rate(self) -> float:
        """What ``training.learning_rate: null`` stands for in a new run."""
        return FULL_LEARNING_RATE if self.lora is None else LORA_LEARNING_RATE

    def with_learning_rate(self, rate: float | Literal["auto"]) -> RunSpec:
        """The same with another ``training.learning_rate``."""
        return self.model_copy(update={"training": self.training.model_copy(update={"learning_rate": rate})})

    @property
    def adapter(self) -> AdapterSpec | None:
        """The adapter that is trained; None: every parameter is."""
        lora = self.lora
        if lora is None:
            return None
        from_base = lora.init in ("pissa", "olora")
        return AdapterSpec(
            lora.r,
            lora.alpha,
            lora.dropout,
            lora.target_modules,
            lora.use_rslora,
            lora.init if from_base else lora.kind,
            tuple(sorted(lora.ranks.items())),
            tuple(sorted(lora.alphas.items())),
            "kaiming" if from_base else lora.init,
            lora.modules_to_save,
        )

    def to_yaml(self) -> str:
        """The resolved spec, every default written out; ``load_spec`` reads it back to an equal one."""
        values = self.model_dump(mode="json")
        if values["lora"] is None:
            del values["lora"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Every value by its key path, as ``training.seed``."""
        return dict(_flat(self.model_dump(mode="json")))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _section(name: str) -> type[Section]:
    kind = RunSpec.model_fields[name].annotation
    section: type[Section] = (*typing.get_args(kind), kind)[0]
    return section


def build_spec(values: Any, where: object, overrides: Sequence[str] = (), stored: bool = False) -> RunSpec:
    """A spec from plain values; each ``section.key=value`` of ``overrides`` replaces one.

    ``section=null`` takes a section out. ``values`` are changed. ``stored``: they are a run's own, and a ``$`` in a
    path is part of its name.
    """
    if not isinstance(values, dict):
        raise SpecError("not a mapping of sections", where, f"sections are {', '.join(RunSpec.model_fields)}")
    given = {assignment.partition("=")[0].partition(".")[0] for assignment in overrides}
    if values.get("lora", ()) is None and "lora" not in given:
        raise SpecError("lora: empty", where, "write lora: {} for its defaults, or omit it to train every parameter")
    rename_aliases(values, where)
    written = copy.deepcopy(values) if overrides else values
    for assignment in overrides:
        override(values, assignment)
    drop_rivals(values, overrides)
    spec, described = _validated(values, stored)
    if spec is not None:
        return spec
    count = f"{len(described)} errors: " if len(described) > 1 else ""
    undoing = _undoing(written, values, described) if overrides else []
    todo = f"undo what the file says with {' '.join(undoing)}" if undoing else None
    of_overrides = caused_by(overrides, described, _validated(written, stored)[1] if overrides else [])
    if len(of_overrides) == len(described):
        raise SpecError(count + "; ".join(described), COMMAND_LINE, todo)
    told = (f"{fault} ({COMMAND_LINE})" if fault in of_overrides else fault for fault in described)
    raise SpecError(count + "; ".join(told), where, todo)


def value_fault(assignment: str) -> str | None:
    """What is wrong with the value of ``section.key=value``, whatever else a spec says; None: nothing is."""
    values: dict[str, Any] = {}
    override(values, assignment)
    field = ".".join(overridden_field(assignment))
    found = _validated(values)[1]
    return next((fault for fault in found if fault.partition(": ")[0].partition(" (value")[0] == field), None)


def _validated(values: dict[str, Any], stored: bool = False) -> tuple[RunSpec | None, list[str]]:
    """The spec, or what is wrong with it; a section that is None is left out."""
    given = {name: value for name, value in values.items() if value is not None or name not in RunSpec.model_fields}
    try:
        return RunSpec.model_validate(given, context={STORED: stored}), []
    except ValidationError as fault:
        sections = {name: _section(name).model_fields for name in RunSpec.model_fields}
        return None, describe_faults(fault.errors(), sections)


def _undoing(written: dict[str, Any], values: dict[str, Any], faults: Sequence[str]) -> list[str]:
    """Overrides that give fields of the file their defaults, where without them an override has fewer faults."""
    found, undoing = _parts(faults), []
    by_overrides = found.difference(_parts(_validated(written)[1]))
    for section, fields in written.items():
        kept = values.get(section)
        if not by_overrides or not isinstance(fields, dict) or not isinstance(kept, dict):
            continue
        for key in fields:
            if key not in kept or kept[key] != fields[key]:
                continue  # an override changed it
            without = {**values, section: {name: value for name, value in kept.items() if name != key}}
            if (left := _parts(_validated(without)[1])) < found and by_overrides - left:
                default = _section(section).model_fields[key].default
                text = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
                undoing.append(shlex.quote(f"{section}.{key}={text.splitlines()[0]}"))
    return undoing


def _parts(faults: Sequence[str]) -> set[str]:
    """Each fault by itself: a section's check reports several in one."""
    split = (fault.partition(": ") for fault in faults)
    return {f"{path}: {part}" for path, _, text in split for part in text.split("; ")}


def known_fields(paths: Sequence[str], option: str) -> tuple[str, ...]:
    """Key paths of the spec, or sections of it, PEFT's spellings replaced; one that there is not names ``option``."""
    named = [overridden_field(path) for path in paths]
    unknown = [path for path, field in zip(paths, named, strict=True) if "=" in path or not _is_known(*field)]
    if unknown:
        told = "; ".join(map(_told_unknown, unknown))
        raise SpecError(f"no key of the spec: {told}", option, "write it as training.learning_rate")
    return tuple(".".join(path) for path in named)


def _told_unknown(given: str) -> str:
    """What was given, and which key may have been meant."""
    keys = given.split(".")
    if len(keys) > 2 or not all(keys):
        return repr(given)
    sections = {name: _section(name).model_fields for name in RunSpec.model_fields}
    (told,) = describe_faults([{"type": "extra_forbidden", "loc": tuple(keys)}], sections)
    return told.replace(": unknown key", "", 1)


def _is_known(section: str, *keys: str) -> bool:
    if section not in RunSpec.model_fields or not keys:
        return section in RunSpec.model_fields
    field = _section(section).model_fields.get(keys[0])
    return field is not None and (len(keys) == 1 or typing.get_origin(field.annotation) is dict)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec from a file; no two ``overrides`` may set the same field."""
    refuse_twice(overrides)
    return build_spec(read_yaml(path), path, overrides)


def load_stored_spec(path: Path) -> RunSpec:
    """Read the spec that a run wrote into its directory."""
    return build_spec(read_yaml(path), path, stored=True)

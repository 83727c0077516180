"""Writes docs/run-spec.md and the JSON schema from the fields of the run spec: ``python docs/make_run_spec.py``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llamatune.spec import RunSpec
from llamatune.spec_schema import SCHEMA_FILE, make_schema, schema_text

INTRODUCTION = """# The run spec

The run spec is the YAML file that `llamatune train` takes: model, adapter, rows and training. This page has every key;
[writing-a-spec.md](writing-a-spec.md) shows how to begin one.

Made by `python docs/make_run_spec.py` from `llamatune/spec_sections.py`; a test keeps the two equal.

YAML (or JSON). Unknown keys are refused with the nearest known name, and all errors are reported together. `1e-5` is a
number, `no` is a word. Any field can be given on the command line as `section.key=value`, a whole section as
`lora={r: 8}`, and `lora=null` leaves it out. Of `num_epochs` and `max_steps`, and of `warmup_steps` and
`warmup_ratio`, the one on the command line takes the place of the other in the file. Where a value on the command line
contradicts the file otherwise, the error says how to undo what the file says: of a file with `nesterov: true`,
`training.momentum=0.0` needs `training.nesterov=false` beside it. In `lora`, PEFT's `lora_alpha`, `lora_dropout`,
`rank_pattern` and `alpha_pattern` stand for `alpha`, `dropout`, `ranks` and `alphas`.

Relative paths are relative to the working directory. In every path, here and on the command line, `~` and `~user` at
the front, `$NAME` and `${NAME}` are expanded; a variable that is not set or empty is an error, and so are other forms
for a shell, such as `$(date)`. What is called so, `$` included, and exists is taken as it is; so is a directory in
place of such an error, for what lies in it. The `spec.yaml` of the run holds the expanded paths.

A run that is started again may raise `training.num_epochs` or `training.max_steps`, raise
`evaluation.early_stopping_patience` or set it to null, and change keys that alter no result
(`training.log_every_steps`, `training.log_layer_grad_norms`, `training.profile_steps`, `training.keep_last`, `tracking`
and others: [reliability.md](reliability.md)). Any other change is refused unless `--allow-spec-change FIELD` names it.
"""


def options_of(annotation: Any) -> list[Any]:
    """The types that a field may have, without their bounds."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return options_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in options_of(part)]
    return [annotation]


def section_of(field: FieldInfo) -> type[BaseModel]:
    """The model behind a section of the spec."""
    return next(o for o in options_of(field.annotation) if isinstance(o, type) and issubclass(o, BaseModel))


def kind_of(field: FieldInfo) -> str:
    """What may be written, in words."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    words = []
    for option in options_of(field.annotation):
        if typing.get_origin(option) is typing.Literal:
            words += [f"`{yaml.safe_dump(value).splitlines()[0]}`" for value in typing.get_args(option)]
        else:
            kind = typing.get_origin(option)
            words.append({tuple: "list", dict: "numbers by module"}[kind] if kind else names[option])
    return " or ".join(words)


def default_of(field: FieldInfo) -> str:
    """The default as YAML."""
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for name, field in RunSpec.model_fields.items():
        section = section_of(field)
        lines += [
            f"## {name}",
            "",
            f"{section.__doc__}",
            "",
            "| key | default | value | meaning |",
            "|---|---|---|---|",
        ]
        for key, inner in section.model_fields.items():
            lines.append(f"| `{key}` | {default_of(inner)} | {kind_of(inner)} | {inner.description or ''} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "run-spec.md").write_text(page(), encoding="utf-8")
    SCHEMA_FILE.write_text(schema_text(make_schema()), encoding="utf-8")

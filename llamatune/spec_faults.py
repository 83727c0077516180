"""Faults of a run spec in words: each by its key path, with the name that was meant by an unknown key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.fields import FieldInfo

from llamatune.errors import SpecError
from llamatune.schema_words import plain_words
from llamatune.spec_types import shown
from llamatune.strict_yaml import parse_yaml

Sections = Mapping[str, Mapping[str, FieldInfo]]
"""The keys of each section of the spec."""

_VALUES_HERE = {
    "lora.use_dora": "kind: dora",
    "lora.init_lora_weights": "'init'",
    "bf16": "training.precision: bf16",
    "fp16": "training.precision: fp16",
    "load_in_4bit": "model.dtype: nf4",
    "load_in_8bit": "model.dtype: int8",
}
"""What other programs have a key for, and what is a value here."""
_OF_OTHERS = {
    "model.path": "base_model model_name model_name_or_path pretrained_model_name_or_path",
    "lora.r": "rank lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_attn_modules targets",
    "data.train": "dataset datasets train_data train_file",
    "data.validation": "val_data valid_data eval_data validation_file eval_dataset",
    "data.packing": "sample_packing packed",
    "training.output_dir": "save_dir output",
    "training.num_epochs": "epochs num_train_epochs n_epochs",
    "training.max_steps": "iters num_steps total_steps max_iters",
    "training.micro_batch_size": "batch_size per_device_train_batch_size train_batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps",
    "training.optimizer": "optim",
    "training.learning_rate": "lr base_lr",
    "training.lr_scheduler": "lr_scheduler_type scheduler lr_schedule",
    "training.warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "training.max_grad_norm": "clip_grad_norm gradient_clipping grad_clip clipping",
    "training.activation_checkpointing": "gradient_checkpointing grad_checkpoint checkpointing",
    "training.log_every_steps": "logging_steps log_every steps_per_report",
    "training.save_every_steps": "save_steps save_every",
    "evaluation.every_steps": "eval_steps eval_every steps_per_eval",
    "evaluation.early_stopping_patience": "early_stopping patience",
}
"""Our keys, and what PEFT, transformers, torchtune, axolotl, LLaMA-Factory and mlx-lm call them."""
_OURS = {theirs: ours for ours, names in _OF_OTHERS.items() for theirs in names.split()}
_OF_PREPARED = ("max_seq_length", "max_length", "seq_len", "sequence_len", "cutoff_len", "max_seq_len")

_LONGEST_VALUE = 200
"""Of one that a message quotes, in characters."""
_UNQUOTED = ", write it without quotes"


def describe_faults(errors: Sequence[Any], sections: Sections) -> list[str]:
    """A line for each error of pydantic; what each member of a union says of one value is one line."""
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    for error in errors:
        by_place.setdefault(_place(error["loc"], sections), []).append(error)
    return [_describe(place, of_place, sections) for place, of_place in by_place.items()]


def _place(location: tuple[Any, ...], sections: Sections) -> tuple[Any, ...]:
    """Without the names of a union's members, which pydantic puts behind the key."""
    known = sections.get(str(location[0]), {}).get(str(location[1])) if len(location) > 1 else None
    if known is None or typing.get_origin(known.annotation) is dict:
        return location
    return (*location[:2], *(part for part in location[2:] if isinstance(part, int)))


def _describe(place: tuple[Any, ...], errors: Sequence[Any], sections: Sections) -> str:
    error = errors[0]
    if error["type"] == "invalid_key" or "[key]" in place:  # the last part is the key, or stands before its mark
        *place_of, key = (part for part in place if part != "[key]")
        return f"{'.'.join(map(str, place_of)) or 'the spec'}: the key {_cut(repr(key))} is no text"
    location = [key for key in place if isinstance(key, str)]
    path = ".".join(location) or "spec"
    path += "".join(f" (value {index + 1})" for index in place if isinstance(index, int))
    match error["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{_hint(path, location, sections)}"
        case "missing":
            return f"{path}: missing"
        case "value_error":
            told, given = str(error["ctx"]["error"]), error.get("input")
            quoted = "valid number" in told and isinstance(given, str) and _is_quoted(given, "float_type")
            return f"{path}: {told}{_UNQUOTED if quoted else ''}"
    given = error.get("input")
    first, *others = dict.fromkeys(map(plain_words, errors))
    expected = " or ".join((first, *(other.removeprefix("should be ") for other in others)))
    told = f" (it is {_cut(shown(given))})" if isinstance(given, str | int | float) else ""
    if given is None:
        told = " (it is null, as ~ alone is in YAML)" if error["type"] == "string_type" else " (it is null)"
    quoted = isinstance(given, str) and any(_is_quoted(given, each["type"]) for each in errors)
    return f"{path}: {expected}{told}{_UNQUOTED if quoted else ''}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."


def _is_quoted(given: str, kind: str) -> bool:
    """Whether a text would be what is wanted if it had no quotes."""
    wanted = {"float_type": (int, float), "int_type": (int,), "bool_type": (bool,)}.get(kind)
    if wanted is None:
        return False
    try:
        return type(parse_yaml(given, "")) in wanted
    except SpecError:  # no YAML: no number
        return False


def _hint(path: str, location: Sequence[str], sections: Sections) -> str:
    """The key, or the option, that an unknown key stands for."""
    key, section = location[-1], location[0] if len(location) > 1 else None
    if key in _OF_PREPARED:
        return "; rows are cut by prepare-data --max-seq-length"
    meant = _VALUES_HERE.get(path) or _VALUES_HERE.get(key)
    if meant is None:
        known = list(sections.get(section, {})) if section else list(sections)
        homes = [name for name, keys in sections.items() if key in keys]
        near = difflib.get_close_matches(key, known, 1, 0.5)
        ours = _OURS.get(key) or (f"{homes[0]}.{key}" if homes else None)
        if ours is None and not near:
            return ""
        meant = repr((ours or near[0]).removeprefix(f"{section}."))
    return f", did you mean {meant}?"

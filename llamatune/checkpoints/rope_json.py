"""RoPE in Hugging Face's ``config.json``, which has several homes for it: read from all, written for every reader.

transformers 4, mlx-lm and Ollama read ``rope_theta`` and ``rope_scaling``; transformers 5 and llama.cpp
``rope_parameters``, of which transformers 5 takes ``rope_scaling`` for another name. The kind is ``rope_type`` or, in
older files, ``type``. No torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.rope_scaling import ROPE_TYPES, DynamicScaling, RopeScaling
from llamatune.strict_json import JsonFields

_DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"


def read_rope(facts: JsonFields, positions: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a model with a context of ``positions``, from all homes, which must agree.

    Raises:
        CheckpointError: two homes differ, by name and with both values; a kind that is not known.
    """
    homes = {key: _home(facts, key) for key in ("rope_parameters", "rope_scaling") if facts.raw.get(key) is not None}
    for fields in (facts, *homes.values()):
        if fields.raw.get("partial_rotary_factor") not in (None, 1.0):
            fields.refuse("partial_rotary_factor", "only 1.0 is supported: anything else computes another model")
    kinds: dict[str, Any] = {}
    for home, fields in homes.items():
        kinds |= {f"{home}.{key}": fields.raw[key] for key in ("rope_type", "type") if fields.raw.get(key) is not None}
    kind = _agreed(facts, kinds) or "default"
    theta = _agreed(facts, _numbers({"": facts, **homes}, "rope_theta"))
    theta = _DEFAULT_THETA if theta is None else theta
    if kind == "default":
        for home, fields in homes.items():
            if not kinds and fields.raw.get("factor") not in (None, 1):
                what = f"{home} has factor {fields.raw['factor']!r} and no rope_type"
                raise CheckpointError(what, facts.path, "add the type that the model was trained with")
        return theta, None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        known = ", ".join(("default", *ROPE_TYPES))
        where = next(iter(kinds))
        raise CheckpointError(f"{where} is {kind!r}, another way to compute the angles", facts.path, f"known: {known}")
    scaling = ROPE_TYPES[kind]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(scaling):
        among = {"": facts, **homes} if field.name == _ORIGINAL else homes
        read = _flags if field.name == "truncate" else _numbers
        values[field.name] = _agreed(facts, read(among, field.name))
    if scaling is DynamicScaling:
        values["context"] = positions
    if _ORIGINAL in values:
        original = values[_ORIGINAL]
        if original is not None and not float(original).is_integer():
            raise CheckpointError(f"{_ORIGINAL} is {original}", facts.path, "a whole number is expected")
        values[_ORIGINAL] = positions if original is None else int(original)
    lacking = [
        f.name for f in dataclasses.fields(scaling) if values[f.name] is None and f.default is dataclasses.MISSING
    ]
    if lacking:
        raise CheckpointError(f"the rope type {kind!r} has no {lacking[0]}", facts.path, "fetch it again")
    return theta, facts.build(scaling, **values)


def rope_facts(config: LlamaConfig) -> dict[str, Any]:
    """RoPE under the keys of every reader."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is None:
        return {
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": theta,
        }
    stated = {"rope_type": scaling.kind, **scaling.facts()}
    return {
        "rope_parameters": {"rope_theta": theta, **stated},
        "rope_scaling": {"type": scaling.kind, **stated},
        "rope_theta": theta,
    }


def _home(facts: JsonFields, key: str) -> JsonFields:
    rope = facts.raw[key]
    if not isinstance(rope, dict):
        facts.refuse(key, "an object is expected")
    if any(isinstance(value, dict) for value in rope.values()):
        facts.refuse(key, "other angles in some layers than in others are not supported")
    return JsonFields(facts.path, rope)


def _numbers(homes: dict[str, JsonFields], key: str) -> dict[str, float]:
    """The number under this key in each home that states it."""
    stated = {home: fields for home, fields in homes.items() if fields.raw.get(key) is not None}
    return {f"{home}.{key}".lstrip("."): fields.number(key, 0.0) for home, fields in stated.items()}


def _flags(homes: dict[str, JsonFields], key: str) -> dict[str, bool]:
    stated = {home: fields for home, fields in homes.items() if fields.raw.get(key) is not None}
    return {f"{home}.{key}": fields.flag(key, False) for home, fields in stated.items()}


def _agreed(facts: JsonFields, stated: dict[str, Any]) -> Any:
    """The one value that all homes state, None if none does."""
    if any(value != first for value in stated.values() for first in stated.values()):
        what = ", ".join(f"{home} is {value}" for home, value in stated.items())
        raise CheckpointError(what, facts.path, "readers differ in which one they take; keep the model's own alone")
    return next(iter(stated.values()), None)

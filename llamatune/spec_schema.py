"""The JSON schema of run specs, as editors and validators use it, and its keys and values. No pydantic.

``run_spec.schema.json`` is made from the spec (``make_schema``), so that it can be printed and completed from at once.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).with_name("run_spec.schema.json")
EDITOR_LINE = "# yaml-language-server: $schema={}"
"""The comment by which a YAML file names its schema to an editor: a path, relative to the file."""
_LINK = re.compile(r"\[[^]]*\]\(([\w-]+\.md)\)")


def make_schema() -> dict[str, Any]:
    """The schema (draft 7) of a file that ``load_spec`` reads. It knows nothing of the rules between keys."""
    from llamatune.spec import RunSpec
    from llamatune.spec_overrides import ALIASES

    made = RunSpec.model_json_schema()
    shared = made.pop("$defs")
    sections = made["properties"]
    for name, written in sections.items():
        (kind,) = {part["$ref"] for part in written.get("anyOf", [written]) if "$ref" in part}
        section = copy.deepcopy(shared[kind.rpartition("/")[2]])
        required = name in made["required"]
        told = [section["description"], *([written["description"]] if "description" in written else [])]
        section["description"] = "; ".join(text.rstrip(".") for text in told)
        if not required and name != "lora":  # an empty one is left out; ``lora:`` alone could mean either
            section["type"] = ["object", "null"]
        sections[name] = section
    for (section, alias), name in ALIASES.items():
        inner = sections[section]
        inner["properties"][alias] = inner["properties"][name] | {"description": f"PEFT's name of {name}"}
        inner.setdefault("allOf", []).append({"not": {"required": [name, alias]}})
    schema: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#"} | made
    _simplify(schema)
    return schema | {"title": "llamatune run spec"}


def _simplify(node: Any) -> None:
    """Take out the titles, and what draft 7 has not: ``prefixItems``; name pages where descriptions link to them."""
    if isinstance(node, dict):
        if isinstance(node.get("description"), str):
            node["description"] = _LINK.sub(r"docs/\1", node["description"])
        if isinstance(node.get("title"), str):
            del node["title"]
        if "prefixItems" in node:
            node["items"], *_ = node.pop("prefixItems")
        for value in node.values():
            _simplify(value)
    elif isinstance(node, list):
        for value in node:
            _simplify(value)


def schema_text(schema: dict[str, Any]) -> str:
    """As the file has it."""
    return json.dumps(schema, indent=2) + "\n"


@functools.cache
def read_schema() -> dict[str, Any]:
    """The schema that is kept beside this module."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


@dataclass(frozen=True)
class SpecKey:
    """A key of the spec, as ``training.seed``. ``values`` are those that can be listed; ``kind`` is in words."""

    name: str
    description: str
    required: bool
    default: Any
    values: tuple[str, ...]
    kind: str


def spec_keys() -> Iterator[SpecKey]:
    """Every key, in the order of the spec; PEFT's names too."""
    for section, inner in read_schema()["properties"].items():
        for name, written in inner["properties"].items():
            yield SpecKey(
                f"{section}.{name}",
                written.get("description", ""),
                name in inner.get("required", ()),
                written.get("default"),
                tuple(_values(written)),
                " or ".join(dict.fromkeys(_kinds(written))),
            )


def section_names() -> tuple[str, ...]:
    """model, lora and so on."""
    return tuple(read_schema()["properties"])


def _parts(written: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for inner in written["anyOf"] for part in _parts(inner)] if "anyOf" in written else [written]


def _values(written: dict[str, Any]) -> Iterator[str]:
    for part in _parts(written):
        if part.get("type") == "boolean":
            yield from ("true", "false")
        elif part.get("type") == "null":
            yield "null"
        elif part.get("type") == "array" and "enum" in part.get("items", {}):
            yield from (value for value in part["items"]["enum"] if value != "all-linear")
        else:
            yield from (str(value) for value in part.get("enum", [part["const"]] if "const" in part else []))


_NAMES = {"string": "text", "integer": "whole number", "number": "number", "array": "list", "object": "mapping"}


def _kinds(written: dict[str, Any]) -> Iterator[str]:
    for part in _parts(written):
        if listed := [value for value in _values(part) if part.get("type") != "array"]:
            yield from listed
        else:
            bounds = [f"{sign} {part[key]:g}" for key, sign in _BOUNDS.items() if key in part]
            yield " ".join([_NAMES[part["type"]], " and ".join(bounds)]).rstrip()


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

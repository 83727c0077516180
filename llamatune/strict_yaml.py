"""YAML read strictly: the scalars of YAML 1.2, no aliases, tags or duplicate keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

from llamatune.errors import SpecError

_NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?")


class _StrictLoader(yaml.SafeLoader):
    """``no`` is a string, ``010`` is ten, ``1e-5`` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem=f"anchors and aliases are not allowed (line {line})")
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"tags are not allowed (line {line})")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                what = f"the key {key.value!r} appears twice" if isinstance(key, yaml.ScalarNode) else "odd key"
                raise yaml.MarkedYAMLError(problem=f"{what} (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = node.value.replace("_", "")
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


_NUMBER_TAG = "tag:yaml.org,2002:float"
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(null|~|)$"), ["n", "~", ""])
_StrictLoader.add_implicit_resolver(_NUMBER_TAG, re.compile(rf"^({_NUMBER.pattern}|\d+\.)$"), list("-+.0123456789"))
_StrictLoader.add_constructor(_NUMBER_TAG, _number)


def parse_yaml(text: str, where: object) -> Any:
    """A YAML document with the strict scalars of a spec; any fault is a one-line ``SpecError``."""
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise SpecError("nested too deeply", where) from None
    except yaml.MarkedYAMLError as fault:
        line = f" (line {fault.problem_mark.line + 1})" if fault.problem_mark else ""
        raise SpecError(f"not valid YAML: {fault.problem}{line}", where) from None
    except (yaml.YAMLError, ValueError) as fault:
        raise SpecError(f"not valid YAML: {str(fault).splitlines()[0]}", where) from None

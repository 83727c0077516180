"""Strict YAML of specs and template files: YAML 1.2's scalars; no anchors, tags, duplicate keys or lone surrogates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llamatune.errors import SpecError
from llamatune.safe_reading import read_bytes

LARGEST_YAML = 1 << 20
"""Bytes of one file."""


_SURROGATE = re.compile("[\ud800-\udfff]")


def _paired(text: str, line: int) -> str:
    """``text`` with each pair of surrogates as its character, as JSON reads them."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise yaml.MarkedYAMLError(problem=f"a lone surrogate, which is no character (line {line})") from None


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``no`` is a string, ``010`` is ten, ``1e-5`` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        for refused, kind in (("anchor", "anchors and aliases"), ("tag", "tags")):
            if getattr(event, refused, None):
                raise yaml.MarkedYAMLError(problem=f"{kind} are not allowed (line {line})")
        if isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
            event.value = _paired(event.value, line)
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


_NUMBER = re.compile(r"^([-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?|\d+\.)$")
_NUMBER_TAG = "tag:yaml.org,2002:float"
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(null|~|)$"), ["n", "~", ""])
_StrictLoader.add_implicit_resolver(_NUMBER_TAG, _NUMBER, list("-+.0123456789"))
_StrictLoader.add_constructor(_NUMBER_TAG, _number)


class _TextLoader(_StrictLoader):
    """Every scalar is a string, except an unquoted null."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_PLAIN = (
    (r"could not find expected ':'", "a key without a colon behind it"),
    (r"mapping values are not allowed here", "a colon where none may be; texts that hold one need quotes"),
    (r"mapping keys are not allowed here", "a question mark where none may be; texts that begin with one need quotes"),
    (r"sequence entries are not allowed here", "a list's dash where none may be"),
    (
        r"found character ('.*') that cannot start any token",
        r"\1 where none may be; texts that begin with it need quotes",
    ),
    (r"found unexpected (end of stream|document separator)", "a text in quotes that does not end"),
    (r"found unknown escape character ('.*')", r"the unknown escape \1 within double quotes"),
    (r"expected escape sequence of (\d+) hexadecimal numbers.*", r"an escape within double quotes needs \1 digits"),
    (r"expected '<document start>'.*", "something follows the values"),
    (r"expected <block end>.*", "it is indented otherwise than the lines before"),
    (r"expected the node content.*", "a value is expected"),
    (r"expected ',' or '(.)'.*", r"a comma or \1 is expected"),
    (r"but found another document", "a second document"),
    (
        r"expected (chomping|indentation|a comment|alphabetic|'|URI|a digit|non-empty).*",
        "a mark of YAML that is not whole",
    ),
    (r"found (undefined|duplicate|incompatible|unhashable|unconstructable).*", "something that specs have no use for"),
)
"""What PyYAML says, in plain words."""


def _plain(problem: str) -> str:
    for theirs, plain in _PLAIN:
        if match := re.fullmatch(theirs, problem, re.DOTALL):
            return match.expand(plain)
    return problem


_NULL = re.compile(r"^(null|Null|NULL|~|)$")
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["n", "N", "~", ""])


def read_yaml(path: Path, scalars_are_texts: bool = False) -> Any:
    """The YAML document in a file of at most 1 MiB; see ``parse_yaml``."""
    try:
        text = read_bytes(path, SpecError, LARGEST_YAML).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise SpecError(f"not UTF-8 at byte {fault.start}", path) from None
    return parse_yaml(text, path, scalars_are_texts)


def parse_yaml(text: str, where: object, scalars_are_texts: bool = False) -> Any:
    """A YAML document's values; any fault is a one-line ``SpecError``."""
    try:
        loader = (_TextLoader if scalars_are_texts else _StrictLoader)(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise SpecError("nested too deeply", where) from None
    except yaml.MarkedYAMLError as fault:
        line = f" (line {fault.problem_mark.line + 1})" if fault.problem_mark else ""
        raise SpecError(f"not valid YAML: {_plain(fault.problem or 'no values')}{line}", where) from None
    except yaml.reader.ReaderError as fault:
        place = text.count("\n", 0, fault.position) + 1
        raise SpecError(f"not valid YAML: the character U+{fault.character:04X} (line {place})", where) from None
    except (ValueError, OverflowError) as fault:  # of int() and chr()
        what = "a whole number of thousands of digits" if "digits" in str(fault) else "an escape of no character"
        raise SpecError(f"not valid YAML: {what}", where) from None

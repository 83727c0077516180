"""docs/reliability.md tells of every fault of the catalogue, and each test that it names is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

from llamatune import formats
from llamatune.cli import VERBS
from llamatune.formats.file_schema import FileSchema

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
CATALOGUE = [
    f"{letter}{number}"
    for letter, count in (("D", 17), ("C", 25), ("N", 18), ("A", 10), ("E", 19), ("S", 14))
    for number in range(1, count + 1)
]


def rows(text: str) -> list[tuple[str, str]]:
    """(id, last column) of each row of a table of faults."""
    return re.findall(r"^\| ([A-Z]\d+) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_of_the_catalogue_is_told_of_once() -> None:
    told = [name for name, _ in rows(PAGE)]
    assert sorted(told) == sorted(CATALOGUE)


def schemas() -> set[str]:
    """The names of the schemas of whole files and lines: those that no other one contains or refines."""
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"{formats.__name__}.{module.name}")
    found, kinds = set[type[FileSchema]](), [FileSchema]
    while kinds:
        refined = [kind for kind in kinds.pop().__subclasses__() if kind.__module__.startswith(formats.__name__)]
        found.update(refined)
        kinds += refined
    parts = {kind for schema in found for kind in schema.__mro__[1:]}
    named = " ".join(str(field.annotation) for schema in found for field in schema.model_fields.values())
    return {kind.__name__ for kind in found - parts if f"{kind.__module__}.{kind.__name__}" not in named}


def test_every_schema_of_our_own_files_is_told_of_with_its_readers() -> None:
    section = PAGE.partition("## Files of our own")[2].partition("\n## ")[0]
    table = re.findall(r"^\| ([^|]+) \| `(\w+)` \| ([^|]+) \|$", section, re.MULTILINE)
    told = [schema for _, schema, _ in table]
    assert len(set(told)) == len(told)
    assert not schemas() - set(told), "schemas that the table lacks"
    assert len(table) == section.count("\n|") - 2, "a row that is not: file, `Schema`, verbs"
    verbs = {name for names in VERBS.values() for name in names}
    for file, schema, readers in table:
        assert set(readers.strip().split(", ")) <= verbs, (file, schema)


def test_every_test_that_is_named_is_there() -> None:
    for name, tests in rows(PAGE):
        for test in tests.split(", "):
            file, _, function = test.partition("::")
            assert (TESTS / file).is_file(), f"{name}: {test}"
            assert function in functions(file), f"{name}: {test}"

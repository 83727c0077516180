"""docs/reliability.md tells of every fault of the catalogue, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

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


def test_every_test_that_is_named_is_there() -> None:
    for name, tests in rows(PAGE):
        for test in tests.split(", "):
            file, _, function = test.partition("::")
            assert (TESTS / file).is_file(), f"{name}: {test}"
            assert function in functions(file), f"{name}: {test}"

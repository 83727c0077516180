"""``llamatune docs``: lists the pages of docs/ and prints one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune import documentation

DOCS = Path(__file__).parents[2] / "docs"
Command = Callable[..., Any]


def test_every_page_is_listed_and_printed_as_it_is(command: Command) -> None:
    listed = json.loads(command("docs", "--json").stdout)["pages"]
    assert set(listed) == {path.stem for path in DOCS.glob("*.md")} - {"README"}
    for name in listed:
        path = DOCS / f"{name}.md"
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {listed[path.stem]}\n")
        assert command("docs", path.stem).stdout == text
    assert command("docs", "docs/memory.md").stdout == (DOCS / "memory.md").read_text(encoding="utf-8")


def test_the_index_has_every_page_once_with_what_it_holds(command: Command) -> None:
    page = (DOCS / "README.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \[([\w-]+)\]\((\S+)\): (.+)$", page, re.MULTILINE)
    assert sorted(name for name, *_ in entries) == sorted(documentation.pages())
    assert all(target == f"{name}.md" for name, target, _ in entries)
    printed = command("docs").stdout
    assert re.findall(r"^(\S.+)$", printed, re.MULTILINE) == re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert re.findall(r"^  ([\w-]+) +(.+)$", printed, re.MULTILINE) == [(name, text) for name, _, text in entries]


@pytest.mark.parametrize(
    ("name", "hint"), [("raport", "did you mean report"), ("xyzzy", "lists them"), ("../README", "lists")]
)
def test_an_unknown_page_is_refused(command: Command, name: str, hint: str) -> None:
    ran = command("docs", name)
    assert (ran.code, ran.stdout) == (2, "")
    assert hint in ran.stderr


def test_an_installation_without_pages_says_so(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documentation, "__file__", str(tmp_path / "package" / "documentation.py"))
    assert "lacks the documentation" in command("docs").stderr

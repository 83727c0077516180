"""The notebook of the Python API: its cells run in their order, say what they promise, and name what there is."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "python.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_cells_run_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str] = []
    for number, source in enumerate(cells("code"), 1):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(compile(source, f"cell {number}", "exec"), names)
        printed.append(shown.getvalue())
    assert len(names["losses"]) == names["summary"]["steps"] == 24
    assert sorted(names["validation"]) == [0, 8, 16, 24]
    assert names["measured"]["loss"] < names["measured"]["base_loss"]
    assert len(names["answers"]["results"]) == 3
    assert "2 lora.rank: unknown key, did you mean 'r'?" in printed[-1]
    assert (tmp_path / "python-example" / "merged" / "model.safetensors").exists()


def test_no_output_and_no_count_of_runs_is_kept() -> None:
    """They would change with each run; the test above says what comes."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_links_lead_somewhere() -> None:
    for text in cells("markdown"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (NOTEBOOK.parent / target).exists(), target


def test_the_pages_examples_are_python() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "docs/python.md", "exec")

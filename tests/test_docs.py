"""Prose that is not run goes stale: the README's commands are run, and pages made from code are compared with it."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamatune.checkpoints.config_files import read_config
from llamatune.demo.run import MATERIAL
from llamatune.shapes.counts import count_parameters
from llamatune.spec import build_spec, load_spec
from llamatune.strict_yaml import parse_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """What the README's user has: a model (a tiny one here), rows, and the README's spec."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama-2-7b").symlink_to(MATERIAL / "base")
    rows = (MATERIAL / "instructions.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (tmp_path / "alpaca_data.json").write_text(f"[{','.join(rows)}]", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return tmp_path


def test_the_readmes_commands_run_in_their_order(workplace: Path) -> None:
    verbs = {command[1] for command in commands()}
    assert {"prepare-data", "train", "merge-lora", "generate", "count-params"} <= verbs
    for command in commands():
        assert command[0] == "llamatune"
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=workplace, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    run = workplace / "runs" / "alpaca"
    for name in ("spec.yaml", "metrics.jsonl", "summary.json", "adapter", "best", "checkpoints"):
        assert (run / name).exists(), name
        assert name in README
    assert json.loads((run / "summary.json").read_text())["best_eval_loss"] > 0


@pytest.mark.parametrize("page", ["README.md", "docs/tracking.md"])
def test_every_yaml_block_is_a_spec(page: str) -> None:
    for block in blocks("yaml", (ROOT / page).read_text(encoding="utf-8")):
        build_spec(parse_yaml(block, page), page)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.yaml")))
def test_every_example_is_a_spec_of_a_model_that_is_there(name: str) -> None:
    spec = load_spec(ROOT / "examples" / name)
    count = count_parameters(read_config(ROOT / spec.model.path))
    assert (count.base_parameters == 100_685_568) == ("100m" in name)


def test_the_readmes_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in blocks("")[0].splitlines():
        tool, target = line.split()
        assert tool == "make"
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = next(block for block in blocks("") if block.startswith("llamatune/"))
    for name in re.findall(r"(?:^|\s{2,})([\w/]+(?:\.py|/))(?=\s)", tree):
        if name != "llamatune/":
            assert (ROOT / "llamatune" / name).exists(), name


def test_the_spec_page_is_made_from_the_spec() -> None:
    found = importlib.util.spec_from_file_location("make_run_spec", ROOT / "docs" / "make_run_spec.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert (ROOT / "docs" / "run-spec.md").read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *map(str, Path("docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target

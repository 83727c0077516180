"""Prose that is not run goes stale: the README's commands are run, and pages made from code are compared with it."""

import importlib.util
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from readme_job import README, ROOT, blocks, commands, make_workplace, other_commands, run_quietly

from llamatune.checkpoints.model_directory import read_config
from llamatune.cli import VERBS
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.option import option_fields
from llamatune.data.chat_messages import ROLES, TRAINING
from llamatune.data.column_maps import PRESETS
from llamatune.data.prepare_report import ADJUSTMENTS
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.torch_builds import BUILDS
from llamatune.spec import build_spec, load_spec
from llamatune.strict_yaml import parse_yaml


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    make_workplace(tmp_path)
    return tmp_path


def test_the_readmes_commands_run_in_their_order_and_warn_of_nothing(workplace: Path) -> None:
    verbs = {command[1] for command in commands()}
    assert {"prepare-data", "train", "merge-lora", "generate", "count-params"} <= verbs
    for command in [*commands(), *other_commands()]:
        assert command[0] == "llamatune"
        if command[1] != "demo":  # which its own tests run
            run_quietly([sys.executable, "-m", *command], workplace, PYTHONWARNINGS="always")
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


def test_no_text_holds_the_marks_of_an_unfinished_merge() -> None:
    kinds, marks = (
        {".md", ".py", ".yaml", ".toml", ".sbatch", ".ipynb", ""},
        ("<" * 7 + " ", ">" * 7 + " ", "=" * 7 + "\n"),
    )
    folders = (ROOT / name for name in ("docs", "llamatune", "tests", "benchmarks", "examples"))
    paths = [*ROOT.glob("*"), *itertools.chain(*(folder.rglob("*") for folder in folders))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.suffix in kinds and path.is_file()}
    assert ROOT / "docs" / "data.md" in texts
    assert [str(path) for path, text in texts.items() if marks[0] in text or marks[1] in text] == []
    assert [str(path) for path, text in texts.items() if text.startswith(marks[2]) or "\n" + marks[2] in text] == []


def test_the_readmes_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in blocks("")[0].splitlines():
        tool, target = line.split()
        assert tool == "make"
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = next(block for block in blocks("") if block.startswith("llamatune/"))
    listed, folder = set(), ""
    for line in tree.splitlines()[1:]:
        nested = folder if line.startswith("    ") else ""
        for name in re.findall(r"(?:^|\s{2,})([\w/]+(?:\.py|/))(?=\s)", line):
            listed.add(nested + name)
            folder = name if name.endswith("/") and not nested else folder
    package = ROOT / "llamatune"
    folders = {f"{path.parent.relative_to(package).as_posix()}/" for path in package.rglob("__init__.py")} - {"./"}
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert listed == folders | files


def test_every_verb_is_run_with_an_eye_on_stderr() -> None:
    """A new verb belongs into README's job, or into OTHER_VERBS; ``make test-wheel`` runs them all."""
    run = {command[1] for command in [*commands(), *other_commands()]}
    assert run == set(itertools.chain(*VERBS.values()))


def test_the_table_of_verbs_has_every_verb() -> None:
    table = README.partition("\n## Every verb\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(itertools.chain(*VERBS.values()))


def _range(figures: list[float]) -> str:
    return f"{min(figures):.1f} to {max(figures):.1f}"


def test_the_peers_figures_are_those_that_were_measured() -> None:
    """A row of docs/performance.md begins with the peer's setting and ends with ratios, the last one that of memory."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    epoch = page.partition("### One epoch end to end\n")[2].partition("\n### ")[0]
    rows = [
        [cell.strip() for cell in row.strip("| ").split(" |")]
        for row in re.findall(r"^\| \w.+\|$", epoch, re.MULTILINE)
    ]
    peers: dict[str, list[list[str]]] = {"PEFT": [], "TRL": [], "torchtune": [], "litgpt": []}
    for row in rows:
        if row[0].startswith(("torchtune", "litgpt")):
            peers[row[0].partition(",")[0]].append(row)
        elif row[0].startswith("SFTTrainer"):
            peers["TRL"].append(row)
        elif re.fullmatch(r"[\d.]+", row[1]):
            peers["PEFT"].append(row)
    table = README.partition("\n## Beside other tools\n")[2].partition("\n## ")[0]
    for name, measured in peers.items():
        loop = name in ("torchtune", "litgpt")
        ratios = [float(ratio) for row in measured for ratio in (row[3] if loop else row[2]).split("; ")]
        memory = "" if loop else _range([float(row[-1]) for row in measured])
        (shown,) = [row.split(" |") for row in table.splitlines() if row.startswith(f"| {name}")]
        assert len(ratios) > 2
        assert [cell.strip() for cell in shown[1:3]] == [_range(ratios), memory], name


def test_the_table_of_builds_is_that_of_the_package() -> None:
    table = README.partition("\n## Install\n")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ") and "pip install" in row]
    for build in BUILDS:
        (row, *more) = [row for row in rows if f"`{build.command}`" in row]
        assert f"CUDA {build.cuda[0]}" in row, row
        assert more == [] or build.cuda == (13, 0) or build.cuda == (12, 6)
    known = {build.command for build in BUILDS}
    advised = {command for row in rows for command in re.findall(r"`(pip install [^`]*)`", row)}
    assert advised - known == {"pip install torch --index-url https://download.pytorch.org/whl/cpu"}


def test_the_spec_page_is_made_from_the_spec() -> None:
    found = importlib.util.spec_from_file_location("make_run_spec", ROOT / "docs" / "make_run_spec.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert (ROOT / "docs" / "run-spec.md").read_text(encoding="utf-8") == module.page()


def test_the_data_page_lists_what_is_read_in_other_forms_and_every_preset() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    kinds = set(re.findall(r"^\| `(\w+)` \|", page.partition("## Rows in other forms")[2], re.MULTILINE))
    assert kinds >= {*ADJUSTMENTS, "preset_NAME"}
    table = page.partition("| preset | fields |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row[2:].partition(" |")[0])}
    assert named == set(PRESETS)
    for name in itertools.chain(TRAINING, *ROLES.values()):
        assert f"`{name}`" in page or f"`{name}: " in page, name


def test_the_generation_page_has_every_option() -> None:
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    assert [option.flag for option in option_fields(GenerateOptions) if f"`{option.flag}`" not in page] == []


_PROSE = [
    *("README.md", "CONTRIBUTING.md", "examples/README.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))),
]


def _prose_lines(text: str) -> list[str]:
    """The lines outside of code, tables, headings, and what a script puts between two comments."""
    text = re.sub(r"^```.*?^```$|^<!-- \w+ -->$.*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith(("|", "#"))]


@pytest.mark.parametrize("page", _PROSE)
def test_prose_is_at_most_120_columns_wide(page: str) -> None:
    wide = [line for line in _prose_lines((ROOT / page).read_text(encoding="utf-8")) if len(line) > 120]
    assert wide == []


def test_wide_prose_is_told_from_tables_and_code() -> None:
    long = "word " * 30
    text = f"{long}\n| {long} |\n```sh\n{long}\n```\n<!-- tiny -->\n{long}\n<!-- end -->\n# {long}\n- {long}\n"
    assert [len(line) > 120 for line in _prose_lines(text) if line] == [True, True]


@pytest.mark.parametrize("page", [*_PROSE, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, heading


_OF_OTHER_PROJECTS = {"hyperparam_utils.py"}


def test_pages_name_files_that_are_there() -> None:
    folders = ("llamatune", "tests", "benchmarks", "make_demo", "docs", "examples")
    there = {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    for page in _PROSE:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in set(re.findall(r"`([\w/]+\.py)`", text)) - _OF_OTHER_PROJECTS:
            assert any(f"/{path}".endswith(f"/{name}") for path in there), f"{page}: {name}"


def texts() -> dict[str, str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*"), *(ROOT / "llamatune").rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages if path.is_file()}


_EXTRA = r"llamatune\s*\[|\bextras? [`'\"]?(?:data|gguf|plots|tensorboard|wandb)\b|\.\[(?!dev\])\w+\]"
_FROM_INDEX = r"pip install (?:-\S+ )*[`'\"]?llamatune(?![\w./-]*(?:\.whl|/))(?! from)"


def test_nobody_is_sent_to_the_package_index_for_this_project() -> None:
    """There ``llamatune`` is another one: what is missing is installed by its own name, this from its checkout."""
    for name, text in texts().items():
        found = re.search(rf"{_EXTRA}|{_FROM_INDEX}|\[plots", text)
        assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    ("text", "sends"),
    [
        ("pip install 'llamatune[plots]'", True),
        ("pip install llamatune", True),
        ("pip install -U llamatune", True),
        ("pip install pyarrow (of the extra 'data')", True),
        ("`pip install '.[data]'` in a checkout", True),
        ("pip install --no-index --find-links wheels llamatune", False),  # asks no index
        ("pip install llamatune-0.1.0-py3-none-any.whl", False),
        ("pip install --no-index --find-links wheels wheels/llamatune-*.whl", False),
        ("pip install pyarrow", False),
        ("pip install .", False),
        ("the extra sample", False),
    ],
)
def test_what_would_send_somebody_there(text: str, sends: bool) -> None:
    assert (re.search(rf"{_EXTRA}|{_FROM_INDEX}", text) is not None) is sends


def test_every_package_that_a_message_names_can_be_installed_by_that_name() -> None:
    """The names are those that pyproject.toml depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    known = {re.split(r"[><=;\[ ]", entry, maxsplit=1)[0] for entry in wanted}
    for name, text in texts().items():
        if name.endswith(".py"):
            named = re.findall(r"pip install '?([A-Za-z][\w.-]*)", text)
            assert not set(named) - known, name

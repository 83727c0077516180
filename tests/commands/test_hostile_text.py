"""Text from files, paths, arguments and specs on stdout, stderr and pages: what is not printable is escaped."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llamatune
from llamatune.commands._progress_bars import ProgressBars, open_console
from llamatune.errors import printable
from llamatune.events import CheckpointSaved, Event, Notice, Progress, RunStarted
from llamatune.strict_json import dump_json_lines, json_line, parse_json

CONTROLS = "\x1b[31m\x1b]0;title\x07\r\x08\x7f\x85\x9b2J\u200f\u202e\u2066\u2028\u2029\ufeff"
MANIFEST = "llamatune.json"
MARKUP = "[/bold][red]x[/] :smile:"
HOSTILE = CONTROLS + MARKUP
_DRAWING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
"""What rich itself writes to a terminal: colours, and moves of the cursor by which it draws again."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def assert_clean(shown: str, on_terminal: bool = False) -> None:
    if on_terminal:
        assert not re.search(r"\x1b\[31m|\x1b\[2J|\x1b\]", shown)
        shown = _DRAWING.sub("", shown)
    assert shown.replace("\n", "").replace("\t", "").isprintable(), ascii(shown)


def hostile_directory(parent: Path) -> Path:
    """A directory whose path holds all that a path may hold, the closing tag too."""
    path = parent / CONTROLS / "[" / "bold][red]x"
    path.mkdir(parents=True)
    return path


def test_json_keeps_the_data_and_shows_no_control_character() -> None:
    for text in (HOSTILE, "\x00\x1f", "\U000e0001", "日本 é 🦙", "a\u3000b", "\ud800"):
        line = json_line({text: [text]})
        assert line.endswith("\n")
        assert line[:-1].isprintable()
        assert json.loads(line) == {text: [text]}
    assert "日本 é 🦙" in json_line("日本 é 🦙")
    assert [parse_json(line) for line in dump_json_lines([HOSTILE, 1]).splitlines()] == [HOSTILE, 1]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_shows_strings_tables_and_texts_escaped_and_without_markup(terminal: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    file = Terminal() if terminal else io.StringIO()
    out = open_console(file)
    table = Table(HOSTILE, "second", title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE))
    for thing in (HOSTILE, Text(HOSTILE), Text(HOSTILE, style="green"), table):
        out.print(thing)
    assert_clean(file.getvalue(), terminal)
    assert file.getvalue().count("[/bold][red]x[/] :smile:") >= 3
    assert file.getvalue().count("\\u202e") >= 4
    assert file.getvalue().startswith(printable(HOSTILE))


def test_every_event_on_a_terminal_is_escaped() -> None:
    file = Terminal()
    bars = ProgressBars(open_console(file))
    counts = {"trainable_parameters": 1, "total_parameters": 2, "train_rows": 3, "validation_rows": 0}
    started = RunStarted(device=HOSTILE, total_steps=2, resumed_step=0, elapsed_s=0.0, num_epochs=1, **counts)
    events: list[Event] = [
        Progress(HOSTILE, 1, 3), Notice(HOSTILE, "warning"), started, CheckpointSaved(1, f"/runs/{HOSTILE}", 1.0),
    ]  # fmt: skip
    for event in events:
        bars._drawn = 0.0
        bars.draw(event)
    bars.close()
    assert_clean(file.getvalue(), on_terminal=True)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, small_base: Path, tiny_rows: Path
) -> tuple[Path, dict[str, list[str]]]:
    """A hostile directory with a base and rows, and the words of each verb, in an order in which they can be run."""
    path = hostile_directory(tmp_path_factory.mktemp("hostile"))
    shutil.copytree(small_base, path / "base")
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    hostile = [{**row, HOSTILE: HOSTILE, "prompt": f"{row['prompt']} {HOSTILE}"} for row in rows if row["completion"]]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hostile))
    (path / "rows.txt").write_text(f"a red llama {HOSTILE}")
    asked = {"question": HOSTILE, "choices": [HOSTILE, "b", "c", "d"], "subject": HOSTILE, "answer": 1}
    (path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    (path / "run.yaml").write_text(
        json.dumps({
            "model": {"path": str(path / "base"), "dtype": "float32"},
            "lora": {"r": 2},
            "data": {"train": str(path / "prepared")},
            "training": {"output_dir": str(path / "run"), "max_steps": 2, "precision": "fp32", "num_epochs": None},
        })
    )  # fmt: skip
    model, adapter = ["--model", f"{path}/base"], ["--adapter", f"{path}/run/adapter"]
    greedy = ["--template", "none", "--max-new-tokens", "3", "--temperature", "0"]
    prepare = [f"{path}/rows.jsonl", "--tokenizer", f"{path}/base/tokenizer.model", "--output", f"{path}/prepared"]
    verbs = {
        "prepare-data": [*prepare, "--max-seq-length", "64", "--preview", "2",
                         "--validation-fraction", "0.25"],
        "plan-memory": [f"{path}/run.yaml"],
        "init": [*model, "--data", f"{path}/rows.jsonl", "--gpu", "t4"],
        "init of prepared rows": [*model, "--data", f"{path}/prepared", "--gpu", "cpu"],
        "init to a file": [*model, "--data", f"{path}/prepared", "--gpu", "t4", "--output", f"{path}/new.yaml"],
        "schema": ["--output", f"{path}/schema.json"],
        "explain": [f"no such model directory: {HOSTILE}"],
        "train --dry-run": [f"{path}/run.yaml", "--dry-run"],
        "train": [f"{path}/run.yaml"],
        "verify": [f"{path}/run"],
        "merge-lora": [*model, *adapter, "--output", f"{path}/merged"],
        "verify of merged": [f"{path}/merged"],
        "generate": [*model, *adapter, *greedy, "--prompt", HOSTILE],
        "generate --compare": [*model, *adapter, *greedy, "--prompt", HOSTILE, "--compare"],
        "evaluate": [*model, *adapter, "--data", f"{path}/prepared"],
        "judge": [f"{path}/run", "--general", f"{path}/rows.txt", "--choices", f"{path}/asked.jsonl"],
        "count-params": [*model, *adapter],
        "report": [f"{path}/run", "--output", f"{path}/page.html"],
    }  # fmt: skip
    return path, verbs


def test_no_verb_shows_a_control_character_of_a_path_a_row_or_a_prompt(
    made: tuple[Path, dict[str, list[str]]], command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, verbs = made
    for name, words in verbs.items():
        done = command(name.split()[0], *words)
        assert done.code == 0, (name, done.stderr)
        assert_clean(done.stdout)
        assert_clean(done.stderr)
        if name in ("train", "verify", "generate --compare", "evaluate", "judge", "count-params"):
            as_json = command(name.split()[0], *words, "--json")
            assert as_json.code == 0, (name, as_json.stderr)
            assert_clean(as_json.stdout + as_json.stderr)
            assert as_json.stdout.count("\n") == 1
            json.loads(as_json.stdout)
        if name in ("train --dry-run", "train", "verify", "generate --compare", "evaluate", "judge"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stdout := Terminal())
                patch.setattr(sys, "stderr", stderr := Terminal())
                command(name.split()[0], *words)
            assert_clean(stdout.getvalue(), on_terminal=True)
            assert_clean(stderr.getvalue(), on_terminal=True)
            assert stdout.getvalue()
    assert json.loads(command("verify", path / "run", "--json").stdout)["path"] == str(path / "run")
    assert_clean((path / "page.html").read_text())


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where the strings of a JSON value are; of a list the first alone."""
    if isinstance(value, str):
        return [path]
    entries = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    )
    return [leaf for key, entry in entries for leaf in leaves(entry, (*path, key))]


def redigest(directory: Path, name: str) -> None:
    """Make the manifest of a directory fit the file again."""
    path = directory / MANIFEST
    if name != MANIFEST and path.exists():
        content, manifest = (directory / name).read_bytes(), json.loads(path.read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.pop("sha256", None)
        path.write_text(json.dumps(manifest))


@pytest.mark.slow
def test_no_string_field_of_a_file_reaches_a_stream_as_it_is(
    made: tuple[Path, dict[str, list[str]]], command: Callable[..., Any], tell: Callable[[str], None]
) -> None:
    path, verbs = made
    for name, words in verbs.items():
        assert command(name.split()[0], *words).code in (0, 5), name  # 5: there already
    count, codes = 0, set[int]()
    for file in sorted(path.rglob("*.json")):
        content = file.read_bytes()
        for leaf in leaves(value := json.loads(content)):
            value = holder = json.loads(content)
            for key in leaf[:-1]:
                holder = holder[key]
            holder[leaf[-1]] = HOSTILE
            file.write_text(json.dumps(value))
            redigest(file.parent, file.name)
            for name in ("verify", "verify of merged", "report", "count-params", "evaluate", "judge", "train"):
                more = (
                    ["--overwrite"] if name == "report" else ["--limit", "2"] if name in ("evaluate", "judge") else []
                )
                done = command(name.split()[0], *verbs[name], *more)
                assert_clean(done.stdout)
                assert_clean(done.stderr)
                codes.add(done.code)
                count += 1
            file.write_bytes(content)
            redigest(file.parent, file.name)
    assert codes <= {0, 2, 3, 4, 5, 6}
    assert count > 100
    tell(f"{count} commands on files with one hostile string, exit codes {sorted(codes)}")


def test_one_way_to_the_streams() -> None:
    """Modules that write to a standard stream; all else that is shown goes through the console of the verb."""
    allowed = {
        "cli.py", "commands/_console.py", "commands/_log_lines.py", "commands/chat.py", "output_files.py",
        "tokenizers/sentencepiece_check.py", "checkpoints/adapter_patterns.py", "benchmarking/measure_cell.py",
    }  # fmt: skip
    found = set()
    for file in (package := Path(llamatune.__file__).parent).rglob("*.py"):
        text = file.read_text()
        if not re.search(r"\bprint\(|sys\.std", text):
            continue
        for node in ast.walk(ast.parse(text)):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            stream = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")
            if named or stream:
                found.add(str(file.relative_to(package)))
    assert found <= allowed, found - allowed

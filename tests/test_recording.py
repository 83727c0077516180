"""README's recording, chart and example page: safe pictures of one run of the commands beside them, which work."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from make_recording import COLUMNS, ROWS, recorded_commands
from readme_job import ROOT
from rich.console import Console
from rich.live import Live
from rich.table import Table
from terminal_svg import Screen, Style, animated_svg

from llamatune import cli
from llamatune.spec import load_spec

DOCS = ROOT / "docs"
RECORDING = (DOCS / "recording.svg").read_text(encoding="utf-8")
PAGE = (DOCS / "example-report.html").read_text(encoding="utf-8")
_SVG = "{http://www.w3.org/2000/svg}"
_TEXTS = {"title", "desc", "style", "text"}
_SHAPES = {"svg", "defs", "g", "use", "rect", "path"}
_MACHINE_PATH = r"(?<![\w.~/<])/(?:home|root|tmp|work|mnt|usr|var|opt|Users|private)\b"


def _rows(svg: str) -> dict[str, str]:
    """The text of each row by its id, each word in the column that it is drawn in; lines and blocks are left out."""
    rows = {}
    for group in ElementTree.fromstring(svg).iterfind(f"{_SVG}defs/{_SVG}g"):
        row = ""
        for text in group.iterfind(f"{_SVG}text"):
            row = row.ljust(round(float(text.attrib["x"]) / 8.4)) + (text.text or "")
        rows[group.attrib["id"]] = row
    return rows


def _shown_at(svg: str, share: float) -> dict[int, str]:
    """The text of each line that has any at a share of the time, by the picture's own key frames."""
    rows, shown = _rows(svg), {}
    for group in ElementTree.fromstring(svg).iter(f"{_SVG}g"):
        if group.get("class") == "f":
            rule = re.search(rf"@keyframes k{group.attrib['id'][1:]}\{{((?:[\d.e-]+%\{{.*?\}})+)\}}", svg)
            assert rule is not None
            stages = re.findall(r"([\d.e-]+)%\{visibility:(\w+)\}", rule[1])
            if [state for at, state in stages if float(at) <= 100 * share][-1] == "visible":
                for use in group.iterfind(f"{_SVG}use"):
                    line = int(use.attrib["y"]) // 18
                    assert line not in shown, "two rows in one place"
                    shown[line] = rows[use.attrib["href"].removeprefix("#")]
    return {line: row for line, row in shown.items() if row}


def test_the_recording_is_a_picture_without_script_that_loads_nothing() -> None:
    root = ElementTree.fromstring(RECORDING)
    for element in root.iter():
        name = element.tag.removeprefix(_SVG)
        assert name in _TEXTS | _SHAPES, name
        assert name in _TEXTS or not (element.text or "").strip()
        for key, value in element.attrib.items():
            assert not key.startswith("on"), key
            assert "href" not in key or value.startswith("#"), value
    assert not re.search(r"url\(|@import|@font-face", RECORDING)
    assert len(RECORDING.encode()) < 300_000
    assert "prefers-color-scheme:dark" in RECORDING
    assert "prefers-reduced-motion" in RECORDING


@pytest.mark.parametrize("name", ["recording.svg", "loss.svg", "example-report.html"])
def test_no_picture_tells_of_the_machine_that_made_it(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert not (found := re.search(_MACHINE_PATH, text)), text[found.start() - 80 : found.end() + 80]
    assert "<script" not in text


def test_machine_paths_are_told_from_others() -> None:
    assert re.search(_MACHINE_PATH, "written to /tmp/abc/runs")
    assert re.search(_MACHINE_PATH, ">/root/x")
    assert not re.search(_MACHINE_PATH, "written to ~/llamatune/runs, tokens/s, </tmp>")


def test_the_recording_shows_readmes_commands_and_what_they_came_to() -> None:
    rows = list(_rows(RECORDING).values())
    commands = recorded_commands()
    assert [command.split()[1] for command in commands] == ["prepare-data", "train", "generate", "report"]
    for command in commands[:-1]:
        first, *others = command.splitlines()
        for line in (f"$ {first}", *(f"> {other}" for other in others)):
            assert " ".join(line.split()) in {" ".join(row.split()) for row in rows}, line
            assert len(line) <= COLUMNS
    (best,) = {found[1] for row in rows if (found := re.search(r"best validation loss +([\d.]+) \(step", row))}
    assert best in PAGE, "the page is about the recorded run"
    last = _shown_at(RECORDING, 1.0)
    assert max(last) < ROWS
    assert "tuned" in " ".join(last.values())


def test_the_commands_below_the_recording_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llamatune", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    shorter = {
        "prepare-data": ["--limit", "40"],
        "train": ["training.num_epochs=null", "training.max_steps=2", "training.warmup_steps=0"],
        "generate": ["--max-new-tokens", "2"],
    }
    for command in recorded_commands():
        words = shlex.split(command.replace("\\\n", " "))
        if words[1] == "report":  # whose charts have tests of their own
            words = words[: words.index("--charts")]
        with pytest.raises(SystemExit) as left:
            cli.main([*words[1:], *shorter.get(words[1], [])])
        assert left.value.code == 0, command
    spec = load_spec(ROOT / "examples" / "tiny.yaml")
    assert (tmp_path / spec.training.output_dir / "adapter").is_dir()
    assert "r 8, alpha 16" in PAGE
    assert "r 8, alpha 16" in (tmp_path / "report.html").read_text(encoding="utf-8")


def _frame(*lines: str) -> tuple[tuple[tuple[str, Style], ...], ...]:
    return tuple(tuple((character, Style()) for character in line) for line in lines)


def test_each_screen_is_shown_in_its_time_and_the_last_one_stands() -> None:
    screens = [("a", "", "same"), ("b  c", "", "same"), ("a", "a", "same"), ("", "<b & c>", "")]
    frames = [(at, _frame(*screen)) for at, screen in zip((0.0, 1.0, 2.5, 3.0), screens, strict=True)]
    svg = animated_svg(frames, 4.0, 10, "a title", "a text")
    for at, screen in ((0.0, 0), (0.9, 0), (1.1, 1), (2.4, 1), (2.6, 2), (2.9, 2), (3.1, 3), (4.0, 3)):
        wanted = {line: text for line, text in enumerate(screens[screen]) if text}
        assert _shown_at(svg, at / 4.0) == wanted, at
    still = set(re.findall(r"#(f\d+)\{visibility:visible;", svg))
    (last,) = [group for group in ElementTree.fromstring(svg).iter(f"{_SVG}g") if group.get("id") in still]
    assert [use.attrib["y"] for use in last] == ["18"]


def test_the_screen_is_what_rich_draws() -> None:
    """A table that grows is redrawn in place; at the end the terminal shows what rich prints of it at once."""
    stream = io.StringIO()
    table = Table("name", "value", title="a table")
    drawn = Console(file=stream, force_terminal=True, width=40, color_system="standard", no_color=False)
    with Live(table, console=drawn, auto_refresh=False) as live:
        for number in range(12):
            table.add_row(f"row {number}", f"[green]{number}[/green]")
            drawn.print(f"line {number}")
            live.refresh()
    plain = io.StringIO()
    Console(file=plain, width=40).print(table)
    screen = Screen(40, 20)
    screen.write(stream.getvalue().replace("\n", "\r\n"))
    rows = ["".join(character for character, _ in row) for row in screen.rows()]
    lines = (
        [f"line {number}" for number in range(12)] + [line.rstrip() for line in plain.getvalue().splitlines()] + [""]
    )
    assert rows == lines[-20:]
    assert any(("7", Style("green")) in row for row in screen.rows())


@pytest.mark.parametrize("control", ["\x1b[2J", "\x1b[48m", "\x07"])
def test_a_control_that_the_screen_does_not_know_is_a_fault(control: str) -> None:
    with pytest.raises(ValueError, match="not known"):
        Screen(10, 3).write(control)

"""Every command of docs/course-report.md on the tiny model that ships, and the output that the page quotes."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_job import MATERIAL, README, ROOT, blocks, make_workplace

from llamatune import cli
from llamatune.documentation import find_page
from llamatune.spec import build_spec
from llamatune.strict_yaml import parse_yaml

PAGE = (ROOT / "docs" / "course-report.md").read_text(encoding="utf-8")
_QUOTED = re.compile(r"^```bash\n(?P<command>.+)\n```\n(?:\n```text\n(?P<text>(?s:.*?))^```$)?", re.MULTILINE)
_PIECE = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|[^\d]+")
_TIMED = re.compile(
    r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?= )"
    r"|(?<=peak_memory_bytes=)\d+|(?<=device_bytes=)\d+|(?<=path=)\S+(?=/checkpoints/)"
    r"|(?<=seconds=)[\d.]+|(?<=_s=)[\d.]+|(?<=tokens_per_second=)\d+|(?<= left=)\S+"
    r"|[\d.]+ [KMG]iB (?=resident, |mapped, |free: )"
    r"|[\d.,]+(?= s\b)"  # seconds
    r"|(?<= s )\s*[\d,]+$"  # tokens/s behind an epoch's seconds
    r"|[\d.]+(?= tokens/s)"
)
_LIMITED = """
import resource, sys
import llamatune.training.train
from llamatune.cli import main
from llamatune.host_memory import held_host_bytes
limit = held_host_bytes()["mapped"] + (int(sys.argv[1]) - 700_000) * 1024
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[2:])
"""
"""``ulimit -v`` where the libraries map 700,000 KiB, as on the page; some builds of torch map gigabytes."""

_SUMS = [(2, 3, "kites"), (4, 1, "hats"), (5, 5, "bells"), (7, 2, "lamps")]
_SUMS += [(3, 3, "drums"), (8, 1, "clocks"), (6, 4, "ropes"), (1, 9, "owls")]
_ASKED = [(3, 2, "kites"), (5, 1, "hats"), (2, 2, "bells"), (6, 2, "lamps")]


def quoted() -> list[tuple[str, list[str]]]:
    """Each command of the page, and the lines that the page quotes of its output."""
    return [(found["command"], (found["text"] or "").splitlines()) for found in _QUOTED.finditer(PAGE)]


def mask(lines: list[str]) -> list[str]:
    """The lines without times, speeds, resident memory and runs of spaces; of tables of those the words alone."""
    masked, hidden, resident = [], False, False
    for line in lines:
        ends = line in ("", "...")  # of a table
        hidden = not ends and (hidden or line.startswith(("Seconds", "Tokens/s", "Speed")))
        resident = not ends and (resident or line.split()[-2:] == ["temporary", "resident"])
        bare = " ".join(_TIMED.sub("#", line).split())
        # The peak of a run on a CPU is its process's, which may have done much before.
        process = line.startswith("peak memory") and ("MiB" in line or "GiB" in line)
        if process:
            bare = bare.replace("GiB", "MiB")
        if hidden or process or line.startswith(("tokens/s", "time for equal work", "- OOM")):
            bare = re.sub(r"[+-]?\d[\d.,]*", "#", bare)
        elif resident and not line.endswith(" resident"):
            bare = re.sub(r"\S+$", "#", bare)
        masked.append(bare)
    return masked


def _number(piece: str) -> float | None:
    return float(piece.replace(",", "")) if "." in piece or "e" in piece else None


def alike(quoted_line: str, line: str) -> bool:
    """Same words and whole numbers, other numbers within 2 %; ``...`` at the end stands for any rest."""
    if quoted_line.endswith("..."):
        return line.startswith(quoted_line.removesuffix("..."))
    pairs = list(zip(_PIECE.findall(quoted_line), _PIECE.findall(line), strict=False))
    if len(pairs) != len(_PIECE.findall(quoted_line)) or len(pairs) != len(_PIECE.findall(line)):
        return False
    for one, other in pairs:
        if one != other:
            if not (one[0].isdigit() and other[0].isdigit()):
                return False
            first, second = _number(one), _number(other)
            if first is None or second is None or abs(first - second) > 0.02 * abs(first) + 0.0101:
                return False
    return True


def missing(wanted: list[str], lines: list[str]) -> list[str]:
    """The quoted lines that do not follow each other in the output."""
    rest: Iterator[str] = iter(mask(lines))
    return [line for line in mask(wanted) if line not in ("", "...") and not any(alike(line, one) for one in rest)]


def _sum_row(first: int, second: int, things: str) -> str:
    total = first + second
    question = f"Ada has {first} {things} and buys {second} more. How many {things} does she have?"
    answer = f"She has {first}+{second}=<<{first}+{second}={total}>>{total} {things}.\n#### {total}"
    return json.dumps({"question": question, "answer": answer})


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_workplace(tmp_path)
    (tmp_path / "run.yaml").write_text(blocks("yaml", PAGE)[0], encoding="utf-8")
    (tmp_path / "gsm8k").mkdir()
    for name, rows in (("train", _SUMS), ("test", _ASKED)):
        text = "".join(f"{_sum_row(*row)}\n" for row in rows)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    examples = "The river of Marby: Alda\nThe river of Pelford: Gilda\nThe river of Kelholm:"
    (tmp_path / "few-shot.txt").write_text(examples, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    return tmp_path


def run(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a command prints.

    ``ulimit -v KIBIBYTES;``, ``2>&1``, ``< FILE`` and ``> FILE`` are what a shell makes of them; what stderr has comes
    first. A command under a limit is a process of its own, and is to end with 5.
    """
    limit, command = re.fullmatch(r"(?:ulimit -v (\d+); )?(.+)", command).groups()  # type: ignore[union-attr]
    words = shlex.split(command)
    both = words[-1] == "2>&1"
    words = words[:-1] if both else words
    if limit:
        child = [sys.executable, "-c", _LIMITED, limit, *words[1:]]
        done = subprocess.run(child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 5, f"{command}: {done.stdout}"
        return done.stdout.splitlines()
    target = Path(words[-1]) if words[-2] == ">" else None
    if words[-2] == "<":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(words[-1]).read_bytes())))
    arguments = words[1:-2] if words[-2] in "<>" else words[1:]
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert words[0] == "llamatune"
    assert left.value.code == 0, f"{command}: {err}"
    if target is not None:
        target.write_text(out, encoding="utf-8")
    return (err + out if both else out).splitlines()


def _check(cells: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what measures cells, and its data, or else all the rest."""
    for place, (command, lines) in enumerate(quoted()):
        if place == 0 or (command.split()[1] == "benchmark") == cells:
            found = missing(lines, run(command, capsys, monkeypatch))
            assert not found, f"{command} does not print {found}"


def test_every_command_prints_what_the_page_quotes(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(False, capsys, monkeypatch)
    epochs = json.loads((workplace / "runs/alpaca/summary.json").read_text())["epochs"]
    for key in re.findall(r"epochs\[(?:-1)?\]\.(\w+)", PAGE):
        assert all(epoch[key] > 0 for epoch in epochs), key
    result = json.loads((workplace / "gsm8k.json").read_text())
    assert json.loads(blocks("json", PAGE)[0]).items() <= result.items()
    for name in ("charts/loss.pdf", "charts/perplexity.svg", "tables/settings.tex", "answers.md", "job.sh"):
        assert (workplace / name).exists(), name
        assert name.rpartition("/")[2].removesuffix(".tex") in PAGE
    settings = (workplace / "tables/settings.md").read_text()
    assert "r 16, alpha 32, dropout 0.05" in settings


@pytest.mark.slow
def test_every_benchmark_prints_what_the_page_quotes(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(True, capsys, monkeypatch)


def test_every_bash_block_is_run_and_every_output_is_read() -> None:
    commands = [command for command, _ in quoted()]
    assert [f"{command}\n" for command in commands] == blocks("bash", PAGE)
    assert sum(bool(lines) for _, lines in quoted()) == len(blocks("text", PAGE)) >= 20
    assert sum(command.split()[1] == "benchmark" for command in commands) == 3


def test_the_spec_of_the_page_has_what_reports_have() -> None:
    spec = build_spec(parse_yaml(blocks("yaml", PAGE)[0], "page"), "page")
    assert spec.lora is not None
    assert (spec.lora.r, spec.lora.alpha, spec.lora.dropout) == (16, 32, 0.05)
    assert (spec.training.micro_batch_size, spec.training.gradient_accumulation_steps) == (1, 8)


def test_docs_and_the_readme_lead_to_the_page() -> None:
    assert find_page("course-report").read_text(encoding="utf-8") == PAGE
    assert "(docs/course-report.md)" in README.partition("## Your course report\n")[2].partition("\n## ")[0]
    assert (MATERIAL / "base").is_dir()


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("steps 72", "steps 71"),
        ("lowest validation loss 2.1115", "lowest validation loss 2.2001"),
        ("tuned kites", "tuned lamps"),
        ("all 6,738,415,616", "all 6,738,415,617"),
        ("Learned: 2.4...", "Diverged: 2.4, above"),
    ],
)
def test_another_output_is_told(wanted: str, line: str) -> None:
    assert missing([wanted], [line]) == [wanted]
    assert missing([wanted], ["before", wanted.replace("...", "700 and more"), "behind"]) == []


def test_times_and_resident_memory_may_differ() -> None:
    one = ["runtime 10.6 s", "peak memory, cpu  289.1 MiB resident", "1 10.09 0.6 s  3,496", "", "Seconds", "ON 0.2"]
    two = ["runtime 1.2 s", "peak memory, cpu  31.9 MiB resident", "1 10.09 0.1 s  9", "", "Seconds", "ON 45.1"]
    assert missing(one, two) == []

"""``generate --prompt-file --output``: results are written as they come, and the same command goes on after a stop."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.commands import _log_lines
from llamatune.commands._log_lines import KeyValueLines
from llamatune.commands._progress_bars import ProgressBars, open_console
from llamatune.events import Progress
from llamatune.inference import engine, generate
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE

Command = Callable[..., Any]
PROMPTS = 21
DRAWN = ("--temperature", 1, "--seed", 3)


@pytest.fixture(autouse=True)
def fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that prompts wait for a row."""
    monkeypatch.setitem(ROWS_AT_ONCE, "cpu", 16)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base: Path, peft_adapter: Callable[..., Path]) -> Path:
    return peft_adapter(base)


@pytest.fixture(scope="module")
def words(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A command line without ``--output``."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(PROMPTS):
            file.write(json.dumps({"prompt": f"{number} " + "llamas " * (number % 5), "completion": "walk"}) + "\n")

    def line(*more: object) -> list[str]:
        given = ["generate", "--model", base, "--adapter", adapter, "--prompt-file", rows, "--max-new-tokens", 7, *more]
        return [str(word) for word in [*given, "--device", "cpu"]]

    return line


def _cuts(content: bytes) -> Iterator[bytes]:
    """What a kill, a full disk or a power cut may leave."""
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for count in (4, 17):
        yield content[: ends[count] + 9]
        yield content[: ends[count]]
    yield content[: ends[2]] + b"\0" * 99
    yield content[: ends[2]] + b"{}\n" + content[ends[2] :]
    yield content.replace(b'"row": 7', b'"row": 9')
    yield content + b'{"row": 22}\n'


@pytest.mark.parametrize(
    "more",
    [
        DRAWN,
        ("--temperature", 0, "--compare", "--stop", "a"),
        (*DRAWN, "--num-return-sequences", 3, "--compare"),
        ("--num-beams", 2, "--num-return-sequences", 2),
    ],
)
def test_whatever_is_left_of_an_output_it_ends_in_the_same_bytes(
    command: Command, words: Callable[..., list[str]], tmp_path: Path, more: tuple[object, ...]
) -> None:
    output = tmp_path / "out.jsonl"
    whole = command(*words(*more), "--json", "--output", output)
    assert whole.code == 0, whole.stderr
    content, results = output.read_bytes(), json.loads(whole.stdout)["results"]
    assert [json.loads(line) for line in content.splitlines()] == results
    assert json.loads(command(*words(*more), "--json").stdout)["results"] == results, "as without an output"
    several = len(results) // PROMPTS
    for left in itertools.islice(_cuts(content), 3 if "--num-beams" in more else None):
        output.write_bytes(left)
        again = command(*words(*more), "--json", "--output", output)
        assert (again.code, output.read_bytes()) == (0, content), left
        assert json.loads(again.stdout)["results"] == results
        pairs = zip(left.splitlines(keepends=True), content.splitlines(keepends=True), strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))) // several * several
        told = f"{output} holds {same} of {len(results)} answers already" in again.stderr
        assert told == (same > 0)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.settings.json"}


def test_a_signal_stops_it_between_two_tokens_and_keeps_what_is_answered(
    command: Command, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, step, calls = tmp_path / "out.jsonl", engine.Engine.step, itertools.count()

    def interrupted(self: engine.Engine) -> Any:
        if next(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(engine.Engine, "step", interrupted)
    stopped = command(*words(*DRAWN), "--output", output)
    kept = output.read_bytes().splitlines()
    assert 0 < len(kept) < PROMPTS
    todo = f"error: stopped after {len(kept)} of {PROMPTS} answers: {output}: run the same command again"
    assert (stopped.code, stopped.stdout, stopped.stderr.splitlines()[-1]) == (75, "", todo)
    assert next(calls) == 13, "no further token"
    monkeypatch.undo()
    assert command(*words(*DRAWN), "--output", output).code == 0
    assert command(*words(*DRAWN), "--output", tmp_path / "whole.jsonl").code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_results_are_in_the_file_before_the_last_is_computed(
    command: Command, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, step, seen = tmp_path / "out.jsonl", engine.Engine.step, list[int]()

    def looked(self: engine.Engine) -> Any:
        seen.append(output.read_bytes().count(b"\n"))
        return step(self)

    monkeypatch.setattr(engine.Engine, "step", looked)
    assert command(*words(*DRAWN), "--output", output).code == 0
    assert 16 in seen


def test_a_finished_output_is_read_without_loading_the_model(
    command: Command, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command(*words(*DRAWN), "--json", "--output", tmp_path / "out.jsonl")
    monkeypatch.setattr(generate, "completions_by_model", None)
    again = command(*words(*DRAWN), "--json", "--output", tmp_path / "out.jsonl")
    assert json.loads(again.stdout) == {**json.loads(whole.stdout), "tokens_per_second": 0}


def test_an_output_of_other_settings_is_left_alone_without_overwrite(
    command: Command, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert command(*words(*DRAWN), "--output", output).code == 0
    content, other = output.read_bytes(), tmp_path / "other.txt"
    other.write_text("a red llama\n")
    (tmp_path / "template.yaml").write_text('prompt: "{prompt} and:"\n')
    (without := words(*DRAWN)).remove("--adapter")
    without.pop(3)
    (elsewhere := words(*DRAWN))[elsewhere.index("--prompt-file") + 1] = str(other)
    for line, named in (
        (words("--temperature", 1), "seed"),
        (words(*DRAWN, "--top-p", 0.5, "--stop", "x"), "top_p, stop"),
        (words(*DRAWN, "--dtype", "bfloat16"), "dtype"),
        (words(*DRAWN, "--template", tmp_path / "template.yaml"), "template"),
        (words(*DRAWN, "--compare"), "compare"),
        (words(*DRAWN, "--num-return-sequences", 2), "num_return_sequences"),
        (without, "adapter"),
        (elsewhere, "prompts"),
    ):
        refused = command(*line, "--output", output)
        told = f"error: written with another {named}: {output}: choose another output, or pass --overwrite\n"
        assert (refused.code, refused.stdout) == (5, "")
        assert refused.stderr.endswith(told), refused.stderr
        assert output.read_bytes() == content
    assert command(*elsewhere, "--output", output, "--overwrite").code == 0
    assert len(output.read_bytes().splitlines()) == 1


def test_the_same_prompts_in_another_file_go_on(
    command: Command, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    output, line = tmp_path / "out.jsonl", words(*DRAWN)
    assert command(*line, "--output", output).code == 0
    place = line.index("--prompt-file") + 1
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(Path(line[place]).read_bytes())
    line[place] = str(copied)
    assert f"holds {PROMPTS} of {PROMPTS} answers" in command(*line, "--output", output).stderr


def test_a_stream_is_written_to_as_results_come(
    command: Command, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert command(*words(*DRAWN), "--output", tmp_path / "out.jsonl").code == 0
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert command(*words(*DRAWN), "--output", tmp_path / "pipe").code == 0
        assert reader.communicate()[0] == (tmp_path / "out.jsonl").read_bytes()


KILLED = """
import os, signal, sys
from llamatune.cli import main
sync = os.fsync
def fsync(descriptor):
    sync(descriptor)
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("out.jsonl"):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_it_goes_on(command: Command, words: Callable[..., list[str]], tmp_path: Path) -> None:
    line = [*words(*DRAWN), "--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 16
    assert command(*line).code == 0
    assert command(*words(*DRAWN), "--output", tmp_path / "whole.jsonl").code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_progress_counts_prompts(base: Path) -> None:
    told = list[Any]()
    sampling = Sampling(3, temperature=1, num_return_sequences=2)
    generate.generate(ModelSource(base, device="cpu"), ["a", "nine"], sampling, on_event=told.append)
    found = [event for event in told if isinstance(event, Progress) and event.task == "generating"]
    assert [(event.done, event.total) for event in found] == [(0, 2), (1, 2), (1, 2), (2, 2)]
    assert all(event.tokens_per_second for event in found)


def test_results_of_prompts_on_the_command_line_are_a_new_file(command: Command, base: Path, tmp_path: Path) -> None:
    words = ("generate", "--prompt", "a", "--max-new-tokens", 2, "--output", tmp_path / "out.jsonl", "--model")
    assert command(*words, base).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    refused = command(*words, "absent")
    assert (refused.code, refused.stderr.startswith("error: exists: ")) == (5, True), "before the model is opened"


def test_progress_shows_the_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log_lines, "_PROGRESS_INTERVAL_S", 0.0)
    KeyValueLines(1).draw(Progress("generating", 3, 10, 1234.5))
    assert capsys.readouterr().err.endswith(" progress generating=3/10 tokens_per_second=1234\n")
    console = open_console(sys.stderr)
    bars = ProgressBars(console)
    bars.draw(Progress("generating", 3, 10, 1234.5))
    with console.capture() as drawn:
        console.print(bars._bars)
    bars.close()
    assert "generating" in drawn.get()
    assert "3/10" in drawn.get()
    assert "1,234 tokens/s" in drawn.get()

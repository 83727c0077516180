"""What each verb writes to, and that it replaces nothing it should not: one table for all of them."""

from __future__ import annotations

import importlib
import os
import threading
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.cli import VERBS
from llamatune.command_options.option import Option, option_fields
from llamatune.commands._typer_options import with_options
from llamatune.formats.manifest import MANIFEST

Command = Callable[..., Any]

READS: dict[str, tuple[tuple[str, str], ...]] = {
    "prepare-data": (("", "file"), ("--tokenizer", "directory")),
    "merge-lora": (("--model", "directory"), ("--adapter", "directory"), ("--probe", "file"), ("--template", "file")),
    "generate": (("--model", "directory"), ("--adapter", "directory"), ("--prompt-file", "file")),
    "evaluate": (("--model", "directory"), ("--data", "directory"), ("--shots-data", "file")),
    "judge": (("", "run"), ("--model", "directory"), ("--data", "directory"), ("--choices", "file")),
    "benchmark": (("", "file"),),
    "sweep": (("", "file"),),
    "report": (("", "run"), ("--prompt-file", "file"), ("--generations", "file")),
    "slurm": (("", "file"),),
    "init": (("--model", "directory"), ("--data", "file")),
    "schema": (),
    "demo": (),
    "convert": (("--model", "directory"),),
    "convert-adapter": (("--adapter", "directory"), ("--model", "directory")),
    "extract-lora": (("--base", "directory"), ("--tuned", "directory")),
}
"""What a verb of the table below is given to read; ``""`` is its argument."""

WRITES = {
    ("prepare-data", "--output"): "product",
    ("merge-lora", "--output"): "product",
    ("generate", "--output"): "answers",
    ("generate", "--markdown"): "file",
    ("evaluate", "--per-row"): "file",
    ("evaluate", "--output"): "answers",
    ("judge", "--plot"): "file",
    ("judge", "--per-question"): "file",
    ("benchmark", "--output"): "run",
    ("sweep", "--output"): "run",
    ("report", "--output"): "file",
    ("report", "--png"): "file",
    ("report", "--charts"): "product",
    ("report", "--tables"): "product",
    ("slurm", "--output"): "file",
    ("init", "--output"): "file",
    ("schema", "--output"): "file",
    ("demo", "--output"): "run",
    ("convert", "--output"): "product",
    ("convert-adapter", "--output"): "product",
    ("extract-lora", "--output"): "product",
    ("extract-lora", "--plot"): "file",
}
"""``train`` writes where its spec says. ``convert`` and ``convert-adapter`` write a file if its name ends in .gguf."""

AS_FILES = {("convert", "--output"): "out.gguf", ("convert-adapter", "--output"): "out.gguf",
            ("extract-lora", "--plot"): "out.png", ("judge", "--plot"): "out.png"}  # fmt: skip
FILES = [place for place, kind in WRITES.items() if kind == "file" or place in AS_FILES]
DIRECTORIES = [place for place, kind in WRITES.items() if kind in ("product", "run")]
REPLACING = [place for place, kind in WRITES.items() if place[0] != "demo"]


def _options(verb: str) -> list[Option]:
    module = verb.replace("-", "_")
    function = getattr(importlib.import_module(f"llamatune.commands.{module}"), module)
    return option_fields(next(iter(typing.get_type_hints(function).values())))


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs of every kind, none of which can be used: whatever is refused is refused before they are opened."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "in"
    (place / "directory").mkdir(parents=True)
    (place / "run").mkdir()
    for name in ("directory/weights", "run/notes", "file"):
        (place / name).write_text(name)
    return place


def _words(verb: str, flag: str, inputs: Path) -> list[object]:
    """A command line without the output of ``flag``."""
    words: list[object] = [verb]
    for option, kind in READS[verb]:
        words += [*([option] if option else []), inputs / kind]
    if verb == "report":
        words += {"--output": [], "--png": ["--output", "page.html"]}.get(flag, ["--output", "/dev/null"])
    if verb == "evaluate":
        words += ["--shots", 1, "--task", "gsm8k"] if flag == "--output" else []
        if flag == "--per-row":
            del words[words.index("--shots-data") :]
    if verb == "extract-lora" and flag == "--plot":
        words += ["--output", "adapter"]
    return words


def test_every_output_of_every_verb_is_in_the_table() -> None:
    """An option that names a path, and is new, must say whether something is written there."""
    found, paths = {}, {}
    for verb in (verb for verbs in VERBS.values() for verb in verbs):
        for option in _options(verb):
            if option.writes:
                found[verb, option.flag] = option.writes if isinstance(option.writes, str) else option.writes(Path("x"))
                if not isinstance(option.writes, str):
                    assert option.writes(Path("x.GGUF")) == "file"
            elif option.kind is Path:
                paths[verb, option.flag] = option
    assert found == WRITES
    assert {flag for _, flag in paths} == {
        "--tokenizer", "--model", "--adapter", "--probe", "--prompt-file", "--from-data", "--generations", "--data",
        "--shots-data", "--base", "--tuned", "--spec-path", "--directory", "--run", "--gsm8k",
    }  # fmt: skip


@pytest.mark.parametrize(("verb", "flag"), FILES)
def test_a_file_that_exists_is_refused_before_anything_is_opened(
    command: Command, inputs: Path, verb: str, flag: str
) -> None:
    name = Path(AS_FILES.get((verb, flag), "there"))
    name.write_text("mine")
    link, dangling = Path(f"link{name.suffix}"), Path(f"dangling{name.suffix}")
    link.symlink_to(name)
    for path in (name, link, Path("in/../") / name):
        done = command(*_words(verb, flag, inputs), flag, path)
        told = f"error: exists: {path}: choose another output, or pass --overwrite\n"
        assert (done.code, done.stdout, done.stderr) == (5, "", told)
    directory = Path(f"directory{name.suffix}")
    directory.mkdir()
    for overwrite in ([], ["--overwrite"]):
        done = command(*_words(verb, flag, inputs), flag, directory, *overwrite)
        assert (done.code, "exists and is not a regular file" in done.stderr) == (5, True), done.stderr
    dangling.symlink_to("absent/x")
    assert command(*_words(verb, flag, inputs), flag, dangling).code == 5
    assert name.read_text() == "mine"
    assert {path.name for path in Path().iterdir()} == {"in", str(name), str(link), str(directory), str(dangling)}


@pytest.mark.parametrize(("verb", "flag"), DIRECTORIES)
def test_a_directory_that_holds_something_else_is_refused_before_anything_is_opened(
    command: Command, inputs: Path, verb: str, flag: str
) -> None:
    Path("there").mkdir()
    Path("there/mine").write_text("mine")
    Path("there/cells").mkdir()  # as a benchmark has
    Path("file").write_text("mine")
    if verb != "demo":  # whose parts are refused, each by its own verb
        done = command(*_words(verb, flag, inputs), flag, "there")
        assert (done.code, "the directory is not empty and holds something else: " in done.stderr) == (5, True)
        assert done.stdout == ""
    for path in ("file", "file/below", "/dev/null"):
        done = command(*_words(verb, flag, inputs), flag, path)
        assert (done.code, "exists and is not a directory" in done.stderr) == (5, True), done.stderr
    assert Path("there/mine").read_text() == Path("file").read_text() == "mine"


@pytest.mark.parametrize(("verb", "flag"), REPLACING)
def test_an_output_that_is_an_input_is_refused_whatever_its_name(
    command: Command, inputs: Path, verb: str, flag: str
) -> None:
    words, suffix = _words(verb, flag, inputs), Path(AS_FILES.get((verb, flag), "")).suffix
    given = {kind for option, kind in READS[verb] if kind != "run" and (not option or option in words)}
    sources = [inputs / {"file": "file", "directory": "directory/weights"}[kind] for kind in given]
    outputs = [inputs / kind for kind in given] + [inputs / "directory" / ".." / kind for kind in given]
    if WRITES[verb, flag] in ("product", "run"):
        outputs += [inputs, inputs.parent]
    else:
        outputs += sources
    for number, source in enumerate(sources):
        os.link(source, f"hard-{number}{suffix}")
        Path(f"soft-{number}{suffix}").symlink_to(source)
        outputs += [Path(f"hard-{number}{suffix}"), Path(f"soft-{number}{suffix}")]
    before = [source.read_text() for source in sources]
    for path in outputs:
        if path.suffix == suffix or flag != "--plot":
            done = command(*words, flag, path, "--overwrite")
            told = (f"{flag} would replace ", f"{flag} is inside of ", f"{flag} is another name of ")
            assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1), (path, done.stderr)
            assert any(text in done.stderr for text in told), (path, done.stderr)
    assert before == [source.read_text() for source in sources]


@pytest.mark.parametrize(
    ("verb", "flag"), [place for place in REPLACING if any(kind == "directory" for _, kind in READS[place[0]])]
)
def test_an_output_inside_of_an_input_directory_is_refused(
    command: Command, inputs: Path, verb: str, flag: str
) -> None:
    (inputs.parent / "alias").symlink_to(inputs / "directory")
    for path in (inputs / "directory" / "out", inputs.parent / "alias" / "out"):
        path = path.with_suffix(Path(AS_FILES.get((verb, flag), "")).suffix if flag == "--plot" else "")
        done = command(*_words(verb, flag, inputs), flag, path)
        assert (done.code, done.stdout, f"error: {flag} is inside of --" in done.stderr) == (2, "", True), done.stderr
    assert [path.name for path in (inputs / "directory").iterdir()] == ["weights"]


@pytest.mark.parametrize(("verb", "flag"), [place for place, kind in WRITES.items() if kind == "product"])
def test_overwrite_removes_neither_the_current_directory_nor_home(
    command: Command, inputs: Path, verb: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = inputs.parent / "home", inputs.parent / "here" / "below"
    home.mkdir()
    here.mkdir(parents=True)
    (here / MANIFEST).write_text("{}")  # as if it were ours
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for path, name in ((here, "current"), (here.parent, "current"), (Path(), "current"), (home, "home")):
        done = command(*_words(verb, flag, inputs), flag, path, "--overwrite")
        assert (done.code, "--overwrite would remove " in done.stderr, name in done.stderr) == (5, True, True)


def test_a_file_of_rows_with_a_weight_is_an_input(command: Command, inputs: Path) -> None:
    done = command("prepare-data", f"{inputs / 'file'}:0.5", "--tokenizer", "absent", "--output", inputs, "--overwrite")
    assert (done.code, "--output would replace ROWS: " in done.stderr) == (2, True), done.stderr


def test_two_outputs_are_two_files(command: Command, inputs: Path) -> None:
    words = ("report", inputs / "run")
    Path("page.html").write_text("mine")
    os.link("page.html", "same.png")
    assert command(*words, "--output", "page.html", "--png", "same.png", "--overwrite").code == 2
    done = command(*words, "--output", "-", "--png", "/dev/stdout")
    assert (done.code, "--output and --png name the same file" in done.stderr) == (2, True)
    words = ("extract-lora", "--base", inputs / "directory", "--tuned", inputs / "run")
    done = command(*words, "--output", "made", "--plot", "made/plot.png")
    assert (done.code, "--output would replace --plot" in done.stderr) == (2, True)


def test_a_page_may_be_inside_of_its_run_but_not_among_the_runs_files(command: Command, inputs: Path) -> None:
    run = inputs / "run"
    for name in ("metrics.jsonl", "summary.json", "adapter/page.html", "best"):
        done = command("report", run, "--output", run / name, "--overwrite")
        assert done.code in (2, 5), done.stderr
    done = command("report", run, "--output", run / "page.html")
    assert (done.code, "not a run directory" in done.stderr) == (4, True)


# What is no regular file is written through.


def _script(command: Command, output: object, *more: object) -> Any:
    return command("slurm", "run.yaml", "--output", output, *more)


@pytest.fixture
def script(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``slurm run.yaml`` prints."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "model: {path: base}\nlora: {r: 2, alpha: 4}\ndata: {train: rows}\n"
        "training: {output_dir: run, num_epochs: 1, learning_rate: 0.1}\n"
    )
    printed: str = command("slurm", "run.yaml").stdout
    assert printed.startswith("#!/bin/bash")
    return printed


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_an_output_may_be_stdout_which_then_has_nothing_else(command: Command, script: str, name: str) -> None:
    Path("link").symlink_to("/dev/stdout")
    done = _script(command, name)
    assert (done.code, done.stdout) == (0, script)
    done = _script(command, name, "--json")
    assert (done.code, done.stdout, "exclude each other" in done.stderr) == (2, "", True)
    assert sorted(path.name for path in Path().iterdir()) == ["link", "run.yaml"]


def test_a_file_may_be_called_minus(command: Command, script: str) -> None:
    assert _script(command, "./-").stdout != script
    assert Path("-").read_text() == script


def test_null_pipes_and_open_files_are_written_through(
    command: Command, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _script(command, "/dev/null").code == 0
    os.mkfifo("pipe")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_text()))
    reader.start()
    assert _script(command, "pipe").code == 0
    reader.join(10)
    assert received == [script]
    assert Path("pipe").is_fifo()
    monkeypatch.setattr("llamatune.output_files.WAIT_FOR_READER_S", 0)
    done = _script(command, "pipe")
    assert (done.code, "a pipe that no program reads" in done.stderr) == (5, True)
    with open("log", "w+") as file:  # as a shell opens it for 5> log
        file.write("before\n")
        file.flush()
        assert _script(command, f"/dev/fd/{file.fileno()}").code == 0
    assert Path("log").read_text() == f"before\n{script}"


def test_what_is_not_open_for_writing_is_refused(command: Command, script: str) -> None:
    with open("run.yaml") as file:
        closed = os.dup(file.fileno())
        os.close(closed)
        for number in (file.fileno(), closed):
            done = _script(command, f"/dev/fd/{number}")
            assert (done.code, "not open for writing" in done.stderr) == (5, True)


def test_a_full_device_is_an_error(command: Command, script: str) -> None:
    done = _script(command, "/dev/full")
    assert (done.code, "no space left" in done.stderr) == (5, True)


def test_the_check_is_of_the_first_rank_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Others may come when it has begun to write."""
    from llamatune.commands.slurm import slurm

    (tmp_path / "there").write_text("mine")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    ran: list[int] = []
    monkeypatch.setattr("llamatune.commands._typer_options.run_on_first", lambda launch, work: ran.append(launch.rank))
    with_options(slurm)(json_mode=False, **_values(tmp_path / "there"))
    assert ran == [1]


def _values(output: Path) -> dict[str, Any]:
    values = {option.name: None if option.required else option.default for option in _options("slurm")}
    return {**values, "specs": [Path("run.yaml")], "output": output}

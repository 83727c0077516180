"""Pipes and standard input, which can be read once, and what a preparation tells of the rows of any file."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepared_rows import alpaca, read_split
from shaped_files import LINES, columnar, save_dataset

from llamatune.command_options.inference import EvaluateOptions, MergeOptions
from llamatune.commands._console import Console
from llamatune.commands.evaluate import evaluate
from llamatune.data import prepare as preparation
from llamatune.data import row_sources
from llamatune.data.row_files import read_raw_rows
from llamatune.errors import DataError, EnvironmentFault, Stopped
from llamatune.events import Event, Notice, ShouldStop
from llamatune.inference.prompt_files import read_prompts
from llamatune.launch_variables import Launch
from llamatune.merge_proof import merge_and_prove

Prepare = Callable[..., SimpleNamespace]


@contextlib.contextmanager
def written_to(path: Path, content: bytes) -> Iterator[None]:
    """A program that writes ``content`` to the pipe at ``path``."""
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    yield
    writer.join()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def standard_input() -> Iterator[Callable[[Path], None]]:
    """Make a file the standard input of this process."""
    kept = os.dup(0)

    def put(path: Path) -> None:
        with path.open("rb") as file:
            os.dup2(file.fileno(), 0)

    yield put
    os.dup2(kept, 0)
    os.close(kept)


def test_a_pipe_gives_what_a_file_gives(prepare: Prepare, fifo: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    prepare(tmp_path / "rows.jsonl", output=tmp_path / "of-file")
    with written_to(fifo, gzip.compress(LINES)):
        assert prepare(fifo, validation_fraction=0.3).rows_in == 7
    with written_to(fifo, LINES):
        prepare(fifo, output=tmp_path / "of-pipe")
    assert read_split(tmp_path / "of-pipe") == read_split(tmp_path / "of-file")
    with written_to(fifo, LINES):
        assert prepare(fifo, output=tmp_path / "of-pipe").unchanged
    with written_to(fifo, LINES):
        assert len(list(read_raw_rows(fifo))) == 7
    assert not row_sources._kept


def test_standard_input_is_a_dash(prepare: Prepare, standard_input: Callable[[Path], None], tmp_path: Path) -> None:
    for content in (LINES, columnar("parquet")):
        (tmp_path / "rows").write_bytes(content)
        standard_input(tmp_path / "rows")
        report = prepare(Path("-"), overwrite=True)
        assert (report.rows_in, report.longest_rows[0]["file"]) == (7, "-")


def test_a_pipe_without_a_writer_ends_by_itself_or_by_a_signal(
    prepare: Prepare, fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sources, "WAIT_FOR_WRITER_S", 0.3)
    with pytest.raises(DataError, match="not a regular file but a pipe, and no program writes to it"):
        prepare(fifo)
    asked: list[bool] = []
    opened = os.open(fifo, os.O_RDWR)  # a writer that writes nothing
    with pytest.raises(Stopped):
        prepare(fifo, should_stop=lambda: asked.append(True) or len(asked) > 4)
    os.close(opened)


def test_a_disk_without_room_for_a_pipe(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = partial(Path("/dev/full").open, "wb", buffering=0)
    monkeypatch.setattr(row_sources.tempfile, "TemporaryFile", full)
    with written_to(fifo, LINES), pytest.raises(EnvironmentFault, match=r"No space left on device: .*: set TMPDIR"):
        list(read_raw_rows(fifo))


def test_refused_rows_are_kept_with_number_line_and_content(prepare: Prepare, tmp_path: Path) -> None:
    bad = json.dumps({"instruction": "é"}, ensure_ascii=False)
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"\n{json.dumps(alpaca(1))}\n\n{bad}\n{{broken\xe9\n")
    listed.write_text(json.dumps([alpaca(2)] * 700 + [json.loads(bad)]))
    table, columns = tmp_path / "rows.csv", tmp_path / "rows.parquet"
    table.write_text('instruction,output\n"a\nb",c\nd\n')
    columns.write_bytes(columnar("parquet", [alpaca(3), alpaca(4, output="")]))
    prepare([lines, listed, table, columns], skip_bad_rows=5)
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row.get("line"), row["row"]) for row in refused] == [
        ("rows.jsonl", 4, 2), ("rows.jsonl", 5, 3), ("rows.json", 1, 701), ("rows.csv", 4, 2), ("rows.parquet", None, 2)
    ]  # fmt: skip
    contents = [row["content"] for row in refused]
    assert contents[:2] == [bad, "{broken\xe9"]
    assert json.loads(contents[2]) == json.loads(bad)
    assert json.loads(contents[3]) == ["d"]
    assert json.loads(contents[4]) == alpaca(4, output="")


def test_messages_and_the_longest_rows_tell_the_row(prepare: Prepare, tmp_path: Path) -> None:
    long = "seven stone " * 40
    lines, columns = tmp_path / "rows.jsonl", tmp_path / "rows.arrow"
    lines.write_text("\n\n" + json.dumps(alpaca(1, output=long)) + "\n")
    columns.write_bytes(columnar("stream", [alpaca(1), alpaca(2, output=long)]))
    assert prepare(lines).longest_rows[0].items() >= {"line": 3, "row": 1}.items()
    assert prepare(columns, overwrite=True).longest_rows[0].keys() == {"tokens", "file", "row"}
    for path, place in ((lines, f"{lines}:3: row 1: "), (columns, f"{columns}: row 2: ")):
        with pytest.raises(DataError) as caught:
            prepare(path, max_seq_length=99, overlong="error", overwrite=True)
        assert str(caught.value).startswith(place + "the row has ")


def test_a_note_is_given_once(prepare: Prepare, tmp_path: Path) -> None:
    path, events = tmp_path / "rows.json", list[Event]()
    path.write_text(json.dumps({"train": [alpaca(1)], "test": [alpaca(2)]}))
    prepare(path, on_event=events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert told == [f"{path}: the rows are those of 'train'; left out beside it: 'test'"]


def test_a_data_set_that_changes_meanwhile_is_an_error(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dataset(tmp_path / "rows", [[alpaca(1)], [alpaca(2)]])
    first = sorted((tmp_path / "rows").glob("*.arrow"))[0]
    encode_batches = preparation.encode_batches

    def changing(*arguments: object) -> object:
        os.utime(first, ns=(1, 1))
        return encode_batches(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preparation, "encode_batches", changing)
    with pytest.raises(DataError, match="a row file was changed while it was read"):
        prepare(tmp_path / "rows")


def _evaluate(pipe: Path, should_stop: ShouldStop) -> None:
    console = Console(json_mode=True)
    console.should_stop = should_stop  # type: ignore[method-assign]
    evaluate(EvaluateOptions(Path("model"), data=pipe, task="gsm8k"), console, Launch())


@pytest.mark.parametrize(
    "read",
    [
        lambda pipe, should_stop: read_prompts(pipe, should_stop=should_stop),
        lambda pipe, should_stop: merge_and_prove(
            MergeOptions(Path("model"), [Path("adapter")], output=Path("merged"), probe=pipe), should_stop=should_stop
        ),
        _evaluate,
    ],
    ids=["prompts", "probe", "evaluate"],
)
def test_a_signal_ends_every_verb_that_waits_for_a_pipe(fifo: Path, read: Callable[[Path, ShouldStop], object]) -> None:
    opened, asked = os.open(fifo, os.O_RDWR), list[bool]()  # a writer that writes nothing
    end = threading.Timer(2, os.close, (opened,))
    end.start()
    with pytest.raises(Stopped):
        read(fifo, lambda: asked.append(True) or len(asked) > 2)
    end.cancel()
    os.close(opened)


def test_a_chat_of_more_messages_than_can_be_rendered_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    rows = [json.dumps({"messages": turns * count}) for count in (1, 1001)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="a chat of 2,002 messages; 2,000 are the most of a row"):
        prepare(tmp_path / "rows.jsonl", template="llama2-chat")

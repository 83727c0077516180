"""The files that a run reads, digested behind its steps and compared: when it goes on, by verify, and over ranks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_tools import launch, run_ranks, wait_for
from run_tools import StopAfter, files, last_checkpoint, make_spec, run_and_record
from thread_ranks import in_threads
from warm import Warm

from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, LlamatuneError, Stopped
from llamatune.events import Event, Notice
from llamatune.formats import background_digests
from llamatune.formats.background_digests import BackgroundDigests
from llamatune.formats.manifest import MANIFEST
from llamatune.ranks import Ranks
from llamatune.spec import RunSpec
from llamatune.training import input_digests, inputs
from llamatune.training.input_digests import digesting
from llamatune.training.inputs import open_inputs
from llamatune.training.train import train
from llamatune.verification import verify

STEPS = {"training__save_every_steps": 1, "training__max_steps": 4}
WEIGHTS = "model.safetensors"


@pytest.fixture
def base(small_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_base, tmp_path / "base"))


@pytest.fixture
def data(prepared: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared(), tmp_path / "data"))


@pytest.fixture
def run_of(base: Path, data: Path, tmp_path: Path) -> Callable[..., RunSpec]:
    return lambda **changes: make_spec(base, data, tmp_path / "run", **{**STEPS, **changes})


def stopped(spec: RunSpec, after: int = 2) -> list[Event]:
    """Train until so many steps are done."""
    stop, told = StopAfter(after), []

    def on_event(event: Event) -> None:
        told.append(event)
        stop.on_event(event)

    with pytest.raises(Stopped):
        train(spec, on_event=on_event, should_stop=stop.should_stop)
    return told


def flip_unsampled(path: Path) -> None:
    """The lowest bit of a weight that the fingerprint does not read: of the embedding's second row."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    embedding = json.loads(path.read_bytes()[8 : 8 + header])["model.embed_tokens.weight"]
    content = bytearray(path.read_bytes())
    content[8 + header + embedding["data_offsets"][0] + 4 * embedding["shape"][1]] ^= 1
    path.write_bytes(content)


def flip_row(path: Path) -> None:
    """The lowest bit of the first token of the rows, which leaves it a token."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    ids = json.loads(path.read_bytes()[8 : 8 + header])["input_ids"]
    content = bytearray(path.read_bytes())
    content[8 + header + ids["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def notices(events: list[Event], about: str) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice) and about in event.message]


def test_every_checkpoint_records_the_whole_base(run_of: Callable[..., RunSpec], base: Path, tmp_path: Path) -> None:
    """By a road of its own: hashlib over each file."""
    _, events = run_and_record(run_of())
    expected = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in base.iterdir()
    }
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        assert json.loads((checkpoint / "state.json").read_text())["base_files"] == expected
    assert not notices(events, "SHA-256")
    report = verify(tmp_path / "run").base
    assert report is not None
    assert (report.path, report.files) == (str(base), len(expected))


def test_a_base_that_changed_ends_the_run_before_a_checkpoint(
    run_of: Callable[..., RunSpec], base: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    spec, saved = run_of(), tmp_path / "run" / "checkpoints"
    stopped(spec)
    before = files(saved)
    flip_unsampled(base / WEIGHTS)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    outcome = command("train", tmp_path / "spec.yaml", "--json")
    assert (outcome.code, outcome.stdout) == (4, "")
    what = f"error: its content is not what it was when the run began: {base / WEIGHTS}: restore the file"
    assert what in outcome.stderr
    assert files(saved) == before
    assert not (tmp_path / "run" / "adapter").exists()
    outcome = command("verify", tmp_path / "run")
    assert (outcome.code, str(base / WEIGHTS) in outcome.stderr) == (4, True)


def test_a_sample_records_nothing_and_keeps_what_was_recorded(
    run_of: Callable[..., RunSpec], base: Path, tmp_path: Path
) -> None:
    """The choice may change between two starts."""
    stopped(run_of(model__verify="sample"), 1)
    assert "base_files" not in json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())
    told = stopped(run_of(), 1)
    assert notices(told, f"the run has no SHA-256 of config.json and {len(list(base.iterdir())) - 1} more yet")
    flip_unsampled(base / WEIGHTS)
    stopped(run_of(model__verify="sample"), 1)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        train(run_of())


def test_a_stop_before_the_digests_are_known_is_told_when_the_run_goes_on(
    run_of: Callable[..., RunSpec], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as slow:
        slow.setattr(BackgroundDigests, "start", lambda self: None)
        slow.setattr(BackgroundDigests, "wait", lambda self, *_: False)
        told = stopped(run_of(), 4)
    assert "base_files" not in json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert not (tmp_path / "run" / "summary.json").exists()  # nor is it called finished without them
    assert not notices(told, "no SHA-256")
    _, events = run_and_record(run_of())
    assert len(notices(events, "no SHA-256 of config.json and ")) == 1


def test_a_slow_disk_lets_no_checkpoint_be_written_on_a_changed_base(
    run_of: Callable[..., RunSpec], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is digested on the side, and no time is given: what is compared is waited for, unless a signal came."""
    stopped(run_of())
    before = files(tmp_path / "run" / "checkpoints")
    flip_unsampled(base / WEIGHTS)
    monkeypatch.setattr(BackgroundDigests, "start", lambda self: None)
    monkeypatch.setattr(background_digests, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(input_digests, "_PATIENCE_S", -1.0)
    told: list[Event] = []
    with pytest.raises(CheckpointError, match=WEIGHTS):
        train(run_of(), on_event=told.append)
    assert notices(told, "waiting for the SHA-256")
    assert files(tmp_path / "run" / "checkpoints") == before
    stop = StopAfter(1)
    changes = ("training.save_every_steps",)
    with pytest.raises(Stopped):
        spec = run_of(training__save_every_steps=3)
        train(spec, allowed_changes=changes, on_event=stop.on_event, should_stop=stop.should_stop)
    assert last_checkpoint(tmp_path / "run").name == "step-000003"
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        train(run_of(training__save_every_steps=3))


def test_a_file_of_the_base_that_is_gone_is_named(run_of: Callable[..., RunSpec], base: Path) -> None:
    stopped(run_of())
    (base / "generation_config.json").unlink(missing_ok=False)
    with pytest.raises(CheckpointError, match=r"missing: .*generation_config\.json"):
        train(run_of())


def test_a_base_with_a_manifest_is_compared_with_it(
    run_of: Callable[..., RunSpec], base: Path, data: Path, tmp_path: Path
) -> None:
    train(run_of())
    merge_lora(MergeOptions(base, tmp_path / "run" / "adapter", tmp_path / "merged"))
    spec = make_spec(tmp_path / "merged", data, tmp_path / "second", **STEPS)
    flip_unsampled(tmp_path / "merged" / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: fetch it again, or remove {MANIFEST}"):
        train(spec)
    assert not (tmp_path / "second" / "checkpoints").exists()
    (tmp_path / "merged" / MANIFEST).write_text("{")
    _, events = run_and_record(spec)
    assert notices(events, "not compared with its manifest")


def test_large_rows_are_digested_behind_and_before_the_first_checkpoint(
    run_of: Callable[..., RunSpec], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (inputs, input_digests):
        monkeypatch.setattr(module, "AT_ONCE_BYTES", 0)
    flip_row(data / "train.safetensors")
    with pytest.raises(CheckpointError, match=r"train\.safetensors: prepare the data again"):
        train(run_of(model__verify="sample"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_evaluate_reads_no_damaged_rows(base: Path, data: Path, command: Callable[..., Any]) -> None:
    content = bytearray((data / "train.safetensors").read_bytes())
    content[-1] ^= 1
    (data / "train.safetensors").write_bytes(content)
    outcome = command("evaluate", "--model", base, "--data", data, "--json")
    assert (outcome.code, outcome.stdout, str(data / "train.safetensors") in outcome.stderr) == (4, "", True)


# Ranks


def test_ranks_end_together_when_the_base_changed(
    warm_ranks: Warm, rank_job: Callable[..., list[str]], base: Path, tmp_path: Path
) -> None:
    command, run = rank_job(training__save_every_steps=2, training__num_epochs=2), tmp_path / "run"
    arguments = [*command, f"training.output_dir={run}", f"model.path={base}"]
    launched = launch(warm_ranks, arguments, 2)
    wait_for(run / "metrics.jsonl", '"step": 3,', launched)
    launched.signal(1, 15)
    assert launched.ended().codes == [75, 75]
    saved = files(run / "checkpoints")
    content = (base / WEIGHTS).read_bytes()
    flip_unsampled(base / WEIGHTS)
    end = launch(warm_ranks, arguments, 2).ended()
    assert (end.codes, len(end.errors)) == ([4, 4], 1), end
    assert str(base / WEIGHTS) in end.errors[0]
    assert files(run / "checkpoints") == saved
    (base / WEIGHTS).write_bytes(content)
    run_ranks(warm_ranks, arguments, 2)


def test_nodes_that_read_other_bytes_are_told(run_of: Callable[..., RunSpec], base: Path) -> None:
    """Two nodes whose copies of the base differ in one bit: each has a thread that digests its own."""
    other = Path(shutil.copytree(base, base.with_name("other")))
    flip_unsampled(other / WEIGHTS)
    spec = run_of()
    found = open_inputs(spec, False, lambda event: None)
    elsewhere = replace(
        found, checkpoint=open_inputs(run_of(model__path=str(other)), False, lambda event: None).checkpoint
    )

    def settle(ranks: Ranks) -> bool:
        with digesting(spec, found if ranks.is_first else elsewhere, ranks, lambda event: None) as digests:
            digests._names = {path.replace(str(other), str(base)): name for path, name in digests._names.items()}
            digests._digests._left = type(digests._digests._left)(
                (path.replace(str(other), str(base)), file) for path, file in digests._digests._left
            )
            digests.start()
            return digests.settle(True, lambda: False)

    with pytest.raises(LlamatuneError, match=f"rank 1 reads another content than rank 0: {base / WEIGHTS}"):
        in_threads(2, settle)


# The thread


@pytest.mark.parametrize("waits", [True, False])
def test_digests_are_those_of_hashlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Blocks that do not divide the files, an empty one among them; by the thread, and by who waits."""
    monkeypatch.setattr(background_digests, "_BLOCK_BYTES", 1000)
    contents = {name: os.urandom(size) for name, size in (("a", 12_345), ("b", 0), ("c", 1000), ("d", 3))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    digests = BackgroundDigests({name: tmp_path / name for name in contents})
    if waits:
        assert digests.wait(None)
    else:
        digests.start()
        digests._thread.join(60)
    assert digests.found == {name: (len(x), hashlib.sha256(x).hexdigest()) for name, x in contents.items()}
    assert [*digests.found] == [*contents]
    digests.abandon()


def test_a_file_is_digested_as_it_was_when_the_run_began(tmp_path: Path) -> None:
    """One that is replaced is another file; one that is cut, or cannot be read, has no digest."""
    for name in ("replaced", "cut"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    digests = BackgroundDigests({name: tmp_path / name for name in ("replaced", "cut")})
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(tmp_path / "replaced")
    digests._advance()  # "replaced"
    digests._advance()
    digests._advance()  # "cut", of which nothing is left
    (tmp_path / "cut").write_bytes(b"")
    assert digests.wait(None)
    assert digests.found == {"replaced": (72, hashlib.sha256(b"replaced" * 9).hexdigest())}
    assert digests.unreadable == {"cut": "it became shorter while it was read"}


def test_who_waits_may_be_stopped_and_a_digest_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_digests, "_BLOCK_BYTES", 10)
    (tmp_path / "file").write_bytes(bytes(100))
    digests = BackgroundDigests({"file": tmp_path / "file"})
    assert not digests.wait(None, lambda: True)
    assert not digests.wait(0)
    digests.start()
    digests.abandon()
    assert not digests._thread.is_alive()

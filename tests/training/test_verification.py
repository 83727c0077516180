"""``llamatune verify`` finds whatever was changed, and says which file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import StopAfter, make_spec

from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, EnvironmentFault, Stopped
from llamatune.events import Notice, Progress
from llamatune.formats.manifest import MANIFEST
from llamatune.training.train import train
from llamatune.verification import verify

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Callable[..., Path],
    prepared: Callable[..., Path],
    meta_copy: Callable[..., Path],
    peft_adapter: Callable[..., Path],
) -> dict[str, Path]:
    """One of each kind."""
    place, data = tmp_path_factory.mktemp("made"), prepared(validation_fraction=0.25, seed=3)
    steps = {"training__max_steps": 2, "training__save_every_steps": 1, "evaluation__every_steps": 1}
    run, full, base = place / "run", place / "full", tiny_base()
    train(make_spec(base, data, run, **steps))
    train(make_spec(base, data, full, lora=None, training__learning_rate=1e-4, **steps))
    nf4 = {"model__dtype": "nf4", "model__quantized_cache": str(place / "cache"), "training__max_steps": 1}
    train(make_spec(base, data, place / "nf4", **nf4))
    train(make_spec(base, data, place / "float8", **{**nf4, "model__dtype": "float8"}))
    merge_lora(MergeOptions(base, run / "adapter", place / "merged"))
    merge_lora(MergeOptions(base, run / "adapter", place / "merged-meta", format="meta"))
    float8, cache = sorted((place / "cache").iterdir())
    return {
        "run": run, "checkpoint": run / "checkpoints" / "step-000002", "adapter": run / "adapter", "best": run / "best",
        "full run": full, "full checkpoint": full / "checkpoints" / "step-000001", "model": full / "model",
        "merged": place / "merged", "merged to meta": place / "merged-meta", "prepared": data,
        "cache": cache.parent, "cached weights": cache, "cached in float8": float8,
        "peft": peft_adapter(base), "hf": base, "meta": meta_copy(base),
    }  # fmt: skip


KINDS = {
    "run": "run", "checkpoint": "checkpoint", "adapter": "adapter", "best": "adapter", "full run": "run",
    "full checkpoint": "checkpoint", "model": "model", "merged": "merged", "merged to meta": "merged",
    "prepared": "prepared", "cache": "quantized-cache", "cached weights": "nf4-weights",
    "cached in float8": "float8-weights",
}  # fmt: skip
FOREIGN = {"peft": "adapter", "hf": "model", "meta": "model"}
WITH_MANIFEST = [name for name in KINDS if name not in ("run", "full run", "cache")]


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.mark.parametrize("name", KINDS)
def test_what_we_wrote_is_in_order(made: dict[str, Path], command: Command, name: str) -> None:
    outcome = command("verify", made[name], "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    told = json.loads(outcome.stdout)
    assert (told["path"], told["kind"], told["checked"], told["ok"]) == (str(made[name]), KINDS[name], "content", True)
    if name in WITH_MANIFEST:
        files = [path for path in made[name].rglob("*") if path.is_file() and path.name != MANIFEST]
        assert (told["files"], told["bytes"]) == (len(files), sum(path.stat().st_size for path in files))


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_is_checked_for_its_structure_and_says_so(
    made: dict[str, Path], command: Command, name: str
) -> None:
    outcome = command("verify", made[name], "--json")
    told = json.loads(outcome.stdout)
    assert (outcome.code, told["kind"], told["checked"]) == (0, FOREIGN[name], "structure")
    assert "no manifest" in outcome.stderr
    human = command("verify", made[name])
    assert "headers and tensors are in order" in human.stdout


@pytest.mark.parametrize("name", [*WITH_MANIFEST, *FOREIGN])
def test_any_file_that_is_gone_or_cut_is_named(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    weights = [path.name for path in made[name].iterdir() if path.suffix in (".safetensors", ".pth")]
    for victim in weights if name in FOREIGN else [path.name for path in made[name].iterdir()]:
        for damage in ("gone", "cut", "longer"):
            copy = copied(made[name], tmp_path)
            content = (copy / victim).read_bytes()
            if damage == "gone":
                (copy / victim).unlink()
            else:
                (copy / victim).write_bytes(content[:-9] if damage == "cut" else content + b"x")
            if (damage, victim) == ("gone", MANIFEST) and KINDS[name] in ("adapter", "model", "merged"):
                assert verify(copy).checked == "structure"
            else:
                with pytest.raises(CheckpointError) as raised:
                    verify(copy)
                named = victim in str(raised.value)
                assert named or name in FOREIGN or (damage, victim) == ("gone", MANIFEST)
                assert raised.value.exit_code == 4
            shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["checkpoint", "merged", "prepared", "cached weights", "run", "cache"])
def test_one_flipped_bit_anywhere_is_found(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """C6: neither safetensors nor JSON would notice most of them."""
    chance, copy = random.Random(name), copied(made[name], tmp_path)
    own = ("spec.yaml", "origin.json", "metrics.jsonl", "summary.json", ".llamatune.lock")  # no manifest tells of them
    files = [path for path in copy.rglob("*") if path.is_file() and path.name not in (*own, MANIFEST)]
    for path in chance.sample(files, min(6, len(files))):
        content = bytearray(path.read_bytes())
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="SHA-256") as raised:
            verify(copy)
        assert str(path) in str(raised.value)
        content[place] ^= bit
        path.write_bytes(content)
    verify(copy)


def test_a_file_that_a_reader_would_take_for_a_part_is_refused_and_others_are_told(
    made: dict[str, Path], tmp_path: Path
) -> None:
    copy = copied(made["merged"], tmp_path)
    (copy / "notes.md").write_text("mine")
    assert verify(copy).unlisted == ["notes.md"]
    for name in ("model-00001-of-00002.safetensors", "adapter_config.json", "consolidated.00.pth"):
        (copy / name).write_text("{}")
        with pytest.raises(CheckpointError, match="not in the manifest") as raised:
            verify(copy)
        assert name in str(raised.value)
        (copy / name).unlink()


HOSTILE = {
    "no JSON": "{", "a list": "[]", "endless nesting": "[" * 100_000, "no files": {"files": {}},
    "another schema": {"schema": 2}, "files of another kind": {"files": ["state.json"]}, "no kind": {"kind": 3},
    "a path upwards": {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
    "an absolute path": {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
    "a path through the back door": {"files": {"a/../../x": {"bytes": 1, "sha256": "0" * 64}}},
    "a name without end": {"files": {"x" * 5000: {"bytes": 1, "sha256": "0" * 64}}},
    "a NUL": {"files": {"a\0b": {"bytes": 1, "sha256": "0" * 64}}},
    "no size": {"files": {"state.json": {"sha256": "0" * 64}}},
    "a size that is none": {"files": {"state.json": {"bytes": True, "sha256": "0" * 64}}},
    "a negative size": {"files": {"state.json": {"bytes": -1, "sha256": "0" * 64}}},
    "a digest that is none": {"files": {"state.json": {"bytes": 1, "sha256": "x"}}},
    "an entry that is a list": {"files": {"state.json": []}}, "too large": "{" + " " * (17 << 20) + "}",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_one_line_and_exit_code_4(
    made: dict[str, Path], tmp_path: Path, command: Command, what: str
) -> None:
    copy, manifest = copied(made["checkpoint"], tmp_path), HOSTILE[what]
    if isinstance(manifest, dict):
        manifest = json.dumps({**json.loads((copy / MANIFEST).read_text()), **manifest})
    (copy / MANIFEST).write_text(manifest)
    outcome = command("verify", copy, "--json")
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (4, "", 1)
    assert MANIFEST in outcome.stderr


@pytest.mark.parametrize("victim", [MANIFEST, "state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling link", "device"])
def test_what_is_no_regular_file_is_refused_at_once(
    made: dict[str, Path], tmp_path: Path, victim: str, kind: str
) -> None:
    copy = copied(made["checkpoint"], tmp_path)
    (copy / victim).unlink()
    if kind == "fifo":
        os.mkfifo(copy / victim)
    elif kind == "directory":
        (copy / victim).mkdir()
    else:
        (copy / victim).symlink_to("nowhere" if kind == "dangling link" else "/dev/zero")
    with pytest.raises(CheckpointError, match=victim):
        verify(copy)


@pytest.mark.parametrize("name", ["run", "full run"])
@pytest.mark.parametrize(
    ("victim", "part"),
    [
        ("adapter", "llamatune.json"), ("best", "llamatune.json"), ("checkpoints/step-000001/state.json", "state.json"),
        ("summary.json", None), ("spec.yaml", "spec.yaml"), ("origin.json", "origin.json"),
        ("metrics.jsonl", "metrics.jsonl"),
    ],
)  # fmt: skip
def test_a_run_without_one_of_its_parts_is_not_in_order(
    made: dict[str, Path], tmp_path: Path, name: str, victim: str, part: str | None
) -> None:
    """Only a summary may be absent: then the run is not finished."""
    copy = copied(made[name], tmp_path)
    gone = copy / victim if (copy / victim).exists() else copy / victim.replace("adapter", "model")
    (shutil.rmtree if gone.is_dir() else os.remove)(gone)
    if part is None:
        assert verify(copy).finished is False
        return
    with pytest.raises(CheckpointError, match=part):
        verify(copy)


LOGS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a step twice": lambda lines: [lines[0], *lines],
    "a step less": lambda lines: lines[1:],
    "the last step less": lambda lines: lines[:-2],
    "no JSON": lambda lines: [lines[0], b"{'event'}\n", *lines[1:]],
    "NaN": lambda lines: [b'{"event": "eval", "loss": NaN}\n', *lines],
    "a list": lambda lines: [b"[1]\n", *lines],
    "torn": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "another line torn": lambda lines: [*lines, b'{"event": "st'],
    "emptied": lambda lines: [],
    "zeros": lambda lines: [b"\0" * sum(map(len, lines))],
}


@pytest.mark.parametrize("damage", LOGS)
def test_a_log_that_is_torn_or_tells_of_other_steps_is_not_in_order(
    made: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    copy = copied(made["run"], tmp_path)
    before_training, *lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines.pop()  # of the epoch
    assert len(lines) == 4
    (copy / "metrics.jsonl").write_bytes(before_training + b"".join(LOGS[damage](lines)))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        verify(copy)


def test_a_run_that_was_killed_may_have_a_torn_line_where_it_will_be_cut(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    run, stop = tmp_path / "run", StopAfter(2)
    with pytest.raises(Stopped):
        train(make_spec(tiny_base(), prepared(), run), on_event=stop.on_event, should_stop=stop.should_stop)
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b'{"event": "step", "st')
    told: list[Any] = []
    found = verify(run, told.append)
    assert (found.steps, found.finished, [part.kind for part in found.parts]) == (2, False, ["checkpoint"])
    assert any(isinstance(event, Notice) and "not finished" in event.message for event in told)


def test_progress_is_told_and_a_signal_ends_it_with_130(
    made: dict[str, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    verify(made["merged"], told.append)
    progress = [event for event in told if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == verify(made["merged"]).bytes
    with pytest.raises(Stopped):
        verify(made["merged"], should_stop=lambda: bool(told))

    from llamatune.formats import manifest as manifests

    opened = manifests.open_regular

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return opened(*arguments)

    monkeypatch.setattr(manifests, "open_regular", interrupted)
    outcome = command("verify", made["merged"], "--json")
    assert (outcome.code, outcome.stdout) == (130, "")


def test_a_file_that_cannot_be_read_is_exit_code_5(
    made: dict[str, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamatune.formats import manifest as manifests

    class Failing:
        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifests, "open_regular", lambda path: Failing())
    outcome = command("verify", made["merged"])
    assert outcome.code == 5
    assert str(made["merged"]) in outcome.stderr


def test_a_report_for_people_names_the_parts(made: dict[str, Path], command: Command) -> None:
    outcome = command("verify", made["run"])
    assert "every byte is in order" in outcome.stdout
    assert "step-000001: checkpoint" in outcome.stdout
    assert "2 steps, finished" in outcome.stdout
    assert EnvironmentFault.exit_code == 5

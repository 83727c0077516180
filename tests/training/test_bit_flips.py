"""Flipped bits: each of what a run reads or writes is found by train, by verify, or by who reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import StopAfter, assert_same_outcome, files, last_checkpoint, make_spec
from slow_cases import slow

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError, LlamatuneError, Stopped
from llamatune.events import Event, Notice, RunStarted
from llamatune.formats.own_digest import dump_with_digest, refuse_altered
from llamatune.spec import RunSpec
from llamatune.training.train import train
from llamatune.verification import verify

Find = Callable[[], bool]
STEPS = {"training__save_every_steps": 1, "training__max_steps": 4, "training__keep_last": 3}


class Place:
    """A base, prepared rows, a run that was stopped after two steps, and its whole products."""

    def __init__(self, path: Path, base: Path, data: Path) -> None:
        self.base, self.data, self.run = path / "base", path / "data", path / "run"
        self.adapter, self.merged, self._scratch = path / "whole" / "adapter", path / "merged", path / "scratch"
        shutil.copytree(base, self.base)
        shutil.copytree(data, self.data)
        train(make_spec(self.base, self.data, path / "whole", **STEPS))
        merge_lora(MergeOptions(self.base, self.adapter, self.merged))
        stop = StopAfter(2)
        with pytest.raises(Stopped):
            train(self.spec, on_event=stop.on_event, should_stop=stop.should_stop)
        self.checkpoint = last_checkpoint(self.run)

    @property
    def spec(self) -> RunSpec:
        return make_spec(self.base, self.data, self.run, **STEPS)

    def kinds(self) -> dict[str, tuple[Path, dict[str, Find]]]:
        """By kind: the directory that is damaged, and who may find it."""
        return {
            "prepared data": (self.data, {
                "train, at the start": lambda: refused(self._start(self.base)),
                "train, at the resume": lambda: refused(lambda: train(self.spec)),
                "verify": self._verified(self.data),
            }),
            "base": (self.base, {
                "train, at the resume": self._resumed_on_the_base,
                "verify": self._verified(self.run),
            }),
            "checkpoint": (self.checkpoint, {
                "train, at the resume": self._skipped,
                "verify": self._verified(self.checkpoint),
            }),
            "adapter": (self.adapter, {
                "reading": lambda: refused(lambda: load_adapter(self.adapter)),
                "verify": self._verified(self.adapter),
            }),
            "merged model": (self.merged, {
                "train, at the start": lambda: refused(self._start(self.merged)),
                "reading": lambda: refused(lambda: load_model(self.merged)),
                "verify": self._verified(self.merged),
            }),
        }  # fmt: skip

    def _verified(self, directory: Path) -> Find:
        return lambda: refused(lambda: verify(directory), CheckpointError)

    def _start(self, base: Path) -> Callable[[], Any]:
        shutil.rmtree(self._scratch, ignore_errors=True)
        steps = {**STEPS, "training__max_steps": 1}
        return lambda: train(make_spec(base, self.data, self._scratch, **steps))

    def _resumed_on_the_base(self) -> bool:
        """Found before anything of the run changed but its log, which a resume cuts."""
        before = files(self.run / "checkpoints")
        found = refused(lambda: train(self.spec))
        assert not found or files(self.run / "checkpoints") == before
        return found

    def _skipped(self) -> bool:
        """A copy of the run takes the checkpoint before, and stops there again."""
        begun, told = [], []
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(self.run, self._scratch)

        def on_event(event: Event) -> None:
            begun.extend([event] if isinstance(event, RunStarted) else [])
            told.extend([event.message] if isinstance(event, Notice) else [])

        with pytest.raises(Stopped):
            spec = make_spec(self.base, self.data, self._scratch, **STEPS)
            train(spec, on_event=on_event, should_stop=lambda: bool(begun))
        skipped = self._scratch / self.checkpoint.relative_to(self.run)
        return any(message.startswith(f"skipped {skipped}") for message in told)


def refused(read: Callable[[], Any], error: type[LlamatuneError] = LlamatuneError) -> bool:
    """Whether it ends in one line; a stop is none, nor is any other exception."""
    try:
        read()
    except error as fault:
        assert fault.exit_code in (3, 4, 5, 6), fault  # 6: a weight became huge, and the gradient is not finite
        return True
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_base: Path, prepared: Callable[..., Path]) -> Place:
    return Place(tmp_path_factory.mktemp("place"), small_base, prepared())


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["prepared data", "base", "checkpoint", "adapter", "merged model"])
@pytest.mark.parametrize("flips", [10, slow(200)])
def test_every_flipped_bit_is_found(place: Place, tell: Callable[[str], None], kind: str, flips: int) -> None:
    """C6. Every second place is one of all bytes, the others are in a file that is drawn first: most are small."""
    directory, finders = place.kinds()[kind]
    found, chance = Counter[str](), random.Random(f"{kind} {flips}")
    all_files = sorted(path for path in directory.rglob("*") if path.is_file())
    for number in range(flips):
        weights = [path.stat().st_size if number % 2 else 1 for path in all_files]
        (path,) = chance.choices(all_files, weights)
        where, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, where, bit)
        by = [name for name, finds in finders.items() if finds()]
        flip(path, where, bit)
        assert by, f"{path}: bit {bit} of byte {where} is flipped, and nobody says so"
        found.update(by)
    tell(f"{kind}: {flips} flips, {', '.join(f'{found[name]} found by {name}' for name in finders)}, 0 silent")


def test_after_all_that_the_run_goes_on_as_if_nothing_had_been(place: Place, tmp_path: Path) -> None:
    train(make_spec(place.base, place.data, tmp_path / "whole", **STEPS))
    shutil.copytree(place.run, tmp_path / "run")
    train(make_spec(place.base, place.data, tmp_path / "run", **STEPS))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_every_bit_of_a_file_with_its_own_digest_is_told(tmp_path: Path) -> None:
    """Brute force over one of 130 bytes: also those that leave its JSON equal, as 1e-5 and 1E-5."""
    path = tmp_path / "file.json"
    content = dump_with_digest({"kind": "a", "rate": 1e-5})
    path.write_bytes(content)
    refuse_altered(path, ("kind", "rate"), 1 << 20)
    assert json.loads(content)["rate"] == 1e-5
    for place in range(len(content)):
        for bit in range(8):
            flip(path, place, bit)
            with pytest.raises(CheckpointError, match=r"file\.json"):
                refuse_altered(path, ("kind", "rate"), 1 << 20)
            flip(path, place, bit)

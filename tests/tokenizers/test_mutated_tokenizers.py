"""Tokenizers damaged at random, read as a verb reads them: an error of ours or a usable model, never a dead process."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trained_tokenizers import tiktoken_file

MODEL = Path(__file__).parents[2] / "llamatune" / "demo" / "base" / "tokenizer.model"
BATCHES, BATCH = 21, 100
SAMPLE = 40
"""Of the first batch, in every run of the suite; the rest is slow."""

READER = """
import resource, sys
from pathlib import Path
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.errors import LlamatuneError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
usable = refused = 0
for path in sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.stem)):
    print("at", path.name, flush=True)
    try:
        tokenizer = load_tokenizer(path)
        for prompt, completion in (("", "a"), ("Capital of Peru?", " Lima \\U0001f999"), ("\\t" * 40, "</s><unk>")):
            ids, first = tokenizer.encode_pair(prompt, completion)
            assert 0 <= first <= len(ids)
            tokenizer.decode(ids)
        tokenizer.pieces()
        usable += 1
    except LlamatuneError as fault:
        assert "\\n" not in str(fault)
        refused += 1
print("done", usable, refused)
"""


def mutated(model: bytes, rng: random.Random) -> bytes:
    """``model`` with a few bytes changed, or a piece cut out, doubled, moved or filled; lengths and tags included."""
    data = bytearray(model)
    for _ in range(rng.choice((1, 1, 2, 8))):
        begin = min(rng.randrange(len(data)), rng.choice((len(data), 4000, 200)) - 1)
        size = min(rng.choice((1, 2, 4, 60, 2000)), len(data) - begin)
        piece = data[begin : begin + size]
        change = rng.randrange(6)
        if change == 0:
            data[begin : begin + size] = rng.randbytes(size)
        elif change == 1:
            data[begin] ^= 1 << rng.randrange(8)
        elif change == 2:
            del data[begin : begin + size]
        elif change == 3:
            data[begin:begin] = piece * rng.choice((1, 3))
        elif change == 4:
            place = rng.randrange(len(data))
            data[place : place + size] = piece
        else:
            data[begin : begin + size] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * size
        if len(data) < 8:
            break
    return bytes(data)


@pytest.mark.parametrize("batch", [pytest.param(n, marks=pytest.mark.slow) if n else n for n in range(BATCHES)])
def test_no_damaged_tokenizer_kills_the_process_s8(batch: int, tmp_path: Path) -> None:
    model, rng = MODEL.read_bytes(), random.Random(batch)
    count = BATCH if batch else SAMPLE
    for number in range(count):
        (tmp_path / f"{number}.model").write_bytes(mutated(model, rng))
    _check(tmp_path, count)


def damaged_definition(text: str, rng: random.Random) -> bytes:
    """A ``tokenizer.json`` with bytes changed, or with values of it removed, exchanged, doubled or of another kind."""
    if rng.random() < 0.4:
        return mutated(text.encode(), rng)
    facts = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        holder = facts
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
                holder = holder[key]
                continue
            other: list[Any] = [
                None, True, -1, 1 << 31, 1 << 63, 1e308, "", "a" * 70_000, "\0", "(a|b*)*c", "\ud7ff", [], {}, ["a"],
                {"type": "Sequence"}, facts.get("normalizer"), facts.get("decoder"), rng.choice(keys), 7, "the",
            ]  # fmt: skip
            if rng.random() < 0.2:
                del holder[key]
            elif isinstance(holder, list) and rng.random() < 0.3:
                holder.append(holder[key])
            else:
                holder[key] = copy.deepcopy(rng.choice(other))
            break
    return json.dumps(facts).encode()


@pytest.mark.parametrize("kind", ["llama_3", "smollm", "unigram", "llama_2"])
@pytest.mark.parametrize("batch", [pytest.param(n, marks=pytest.mark.slow) if n else n for n in range(BATCHES)])
def test_no_damaged_definition_kills_the_process_s8(
    json_tokenizers: dict[str, Path], kind: str, batch: int, tmp_path: Path
) -> None:
    text, rng = (json_tokenizers[kind] / "tokenizer.json").read_text(), random.Random(batch)
    count = BATCH if batch else SAMPLE
    for number in range(count):
        shutil.copytree(json_tokenizers[kind], tmp_path / f"{number}")
        (tmp_path / f"{number}" / "tokenizer.json").write_bytes(damaged_definition(text, rng))
    _check(tmp_path, count)


@pytest.mark.parametrize("batch", [pytest.param(n, marks=pytest.mark.slow) if n else n for n in range(6)])
def test_no_damaged_tiktoken_file_kills_the_process_s8(
    json_tokenizers: dict[str, Path], batch: int, tmp_path: Path
) -> None:
    content, rng = tiktoken_file(json_tokenizers["llama_3"]), random.Random(batch)
    count = BATCH if batch else SAMPLE
    for number in range(count):
        (tmp_path / f"{number}.model").write_bytes(mutated(content, rng))
    _check(tmp_path, count)


def _check(directory: Path, count: int) -> None:
    """Read each tokenizer of the directory in one process, which must refuse by our errors and print nothing else."""
    command = [sys.executable, "-c", READER, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    last = done.stdout.splitlines()[-2:]
    assert done.returncode == 0, f"{last}: {_ending(done.returncode)}: {done.stderr[-2000:]}"
    assert not done.stderr
    word, usable, refused = done.stdout.splitlines()[-1].split()
    assert (word, int(usable) + int(refused)) == ("done", count)
    assert int(refused) > 0, "no mutation did any damage"


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"

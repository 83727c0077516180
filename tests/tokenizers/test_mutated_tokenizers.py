"""Tokenizers damaged at random, read as a verb reads them: an error of ours or a usable model, never a dead process."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[2] / "llamatune" / "demo" / "base" / "tokenizer.model"
BATCHES, BATCH = 21, 100
SAMPLE = 40
"""Of the first batch, in every run of the suite; the rest is slow."""

READER = """
import sys
from pathlib import Path
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.errors import LlamatuneError
usable = refused = 0
for path in sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.stem)):
    print("at", path.name, flush=True)
    try:
        tokenizer = load_tokenizer(path)
        for prompt, completion in (("", "a"), ("Capital of Peru?", " Lima \\U0001f999"), ("\\t" * 40, "</s><unk>")):
            ids, first = tokenizer.encode_pair(prompt, completion)
            assert 0 <= first <= len(ids)
            tokenizer.decode(ids)
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
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True)
    last = done.stdout.splitlines()[-2:]
    assert done.returncode == 0, f"{last}: {_ending(done.returncode)}: {done.stderr[-2000:]}"
    word, usable, refused = done.stdout.splitlines()[-1].split()
    assert (word, int(usable) + int(refused)) == ("done", count)
    assert int(refused) > 0, "no mutation did any damage"


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"

"""Times prepare-data against ``datasets.map`` with the same tokenizer on the same cores, alternating.

``python benchmarks/preparing.py --tokenizer PATH --source alpaca_data.json --rows 100000`` writes so many rows of
Alpaca's kind as JSON Lines, each different, and prepares them with each number of ``--workers``, and with ``datasets``
on as many processes. A figure is the whole process, with the start of Python: seconds, rows a second, and the peak of
resident memory, the sum over its processes. ``--peer PYTHON`` names an interpreter that has ``datasets``; the peer is
left out where there is none. It encodes each row once, with one call of ``map``, and the prompt again for the mask.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_json import decode_row

OURS = """
import sys
from pathlib import Path
from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
rows, tokenizer, output, workers = sys.argv[1:]
prepare_data(PrepareOptions(rows=[Path(rows)], tokenizer=Path(tokenizer), output=Path(output)), workers=int(workers))
"""

PEER = """
import sys
from pathlib import Path
import datasets
rows, tokenizer, output, workers = sys.argv[1:]
tokenizer = Path(tokenizer)
if (tokenizer / "tokenizer.json").is_file():
    from tokenizers import Tokenizer
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encode = lambda text: encoder.encode(text).ids
else:
    from sentencepiece import SentencePieceProcessor
    path = tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer
    encode = SentencePieceProcessor(model_file=str(path)).encode
HEAD = "Below is an instruction that describes a task"
PLAIN = HEAD + ". Write a response that appropriately completes the request.\\n\\n### Instruction:\\n{instruction}"
WITH = HEAD + ", paired with an input that provides further context. Write a response that appropriately completes the "
WITH += "request.\\n\\n### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}"
def row_of(row):
    prompt = (WITH if row["input"] else PLAIN).format(**row) + "\\n\\n### Response:"
    ids, own = [1, *encode(prompt + row["output"]), 2][:512], len(encode(prompt)) + 1
    return {"input_ids": ids, "labels": [-100] * own + ids[own:]}
data = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=output + ".cache")
data.map(row_of, remove_columns=data.column_names, num_proc=int(workers)).save_to_disk(output)
"""


def write_rows(path: Path, source: Path, count: int) -> None:
    """``count`` rows of ``source`` over and over, each with its number."""
    given = [decode_row(raw) for raw in read_raw_rows(source)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = given[number % len(given)]
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} ({number})"}) + "\n")


def resident_bytes(leader: int) -> int:
    """Of all processes in the session of ``leader``."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    total += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue
    return total


def timed(command: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of processor time, and the peak of resident bytes."""
    begin, peak, used = time.perf_counter(), 0, processor_time()
    quiet = {"env": {**os.environ, "HF_HUB_OFFLINE": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **quiet) as child:
        while child.poll() is None:
            peak = max(peak, resident_bytes(child.pid))
            time.sleep(0.1)
        fault = child.stderr.read().decode()
    if child.returncode:
        sys.exit(fault[-2000:])
    return time.perf_counter() - begin, processor_time() - used, peak


def processor_time() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def has_datasets(python: str) -> bool:
    """Whether the interpreter ``python`` can run the peer."""
    return subprocess.run([python, "-c", "import datasets"], capture_output=True, check=False).returncode == 0


def show(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True, help="a file of Alpaca rows")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="1: in the process itself")
    parser.add_argument("--peer", default=sys.executable, help="an interpreter that has datasets")
    given = parser.parse_args()
    programs = {"llamatune": (sys.executable, OURS)}
    if has_datasets(given.peer):
        programs["datasets.map"] = (given.peer, PEER)
    else:
        show("datasets is not installed: llamatune alone")
    cases = [(name, workers) for workers in given.workers for name in programs]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        write_rows(rows, given.source, given.rows)
        show(f"{given.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB")
        for number in range(given.rounds):
            for name, workers in cases:
                python, code = programs[name]
                with tempfile.TemporaryDirectory(dir=place) as output:
                    made = [str(rows), str(given.tokenizer), f"{output}/made", str(workers)]
                    took, used, peak = timed([python, "-c", code, *made])
                seconds[name, workers].append(took)
                rate = f"{given.rows / took:8,.0f} rows/s, peak {peak / 2**20:6,.0f} MiB"
                show(f"{number + 1} {name:12} {workers} workers: {took:7.2f} s, processors {used:7.2f} s, {rate}")
    median = {case: statistics.median(times) for case, times in seconds.items()}
    for workers in given.workers:
        ours, peers = median["llamatune", workers], median.get(("datasets.map", workers))
        line = f"{workers} workers: {ours / given.rows * 1e6:.1f} µs a row"
        show(line + (f", datasets.map {peers / ours:.2f} times as long" if peers else ""))
    first, last = given.workers[0], given.workers[-1]
    show(f"{last} workers are {median['llamatune', first] / median['llamatune', last]:.2f} times as fast as {first}")


if __name__ == "__main__":
    main()

"""Times merge-lora against copying the same files, alternating, and shows the peak of its memory.

``python benchmarks/merging.py DIRECTORY --layers 8`` makes a base of LLaMA-2-7B's shape with so many layers, and an
adapter, on the disk to measure. ``cp`` copies the base's files, and ``sync`` makes them durable; llamatune's time is
that of the whole process, durable too. ``--peer`` adds PEFT's ``merge_and_unload`` and ``save_pretrained``, synced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from material import ALPHA, TARGETS, R, write_config

from llamatune.checkpoints import huggingface_files
from llamatune.checkpoints.adapter import Adapter, write_adapter
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.events import ignore_event
from llamatune.formats.manifest import build_directory
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.presets import PRESETS

PEER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def make_base(directory: Path, config: LlamaConfig, format_: str, shards: int) -> Path:
    """A model in bf16 whose matrices are all cut from the same numbers, from N(0, 0.02²)."""
    shapes = dict(config.parameter_shapes())
    bank = torch.empty(max(torch.Size(shape).numel() for shape in shapes.values()), dtype=torch.bfloat16)
    bank.normal_(0, 0.02, generator=torch.Generator().manual_seed(7))

    def weight_of(name: str) -> torch.Tensor:
        return bank[: torch.Size(shapes[name]).numel()].view(shapes[name])

    write = write_huggingface if format_ == "hf" else write_meta
    shard_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) // shards + (1 << 20)
    with (
        mock.patch.object(huggingface_files, "_SHARD_BYTES", shard_bytes),
        tempfile.TemporaryDirectory() as source,
        build_directory(directory, "model", {}) as staging,
    ):
        write_config(Path(source), config, torch.bfloat16)
        write(staging, config, weight_of, lambda name: torch.bfloat16, Path(source), ignore_event)
    return directory


def make_adapter(directory: Path, config: LlamaConfig, targets: tuple[str, ...]) -> Path:
    """An adapter with a B that is not zero."""
    spec = AdapterSpec(R, ALPHA, target_modules=targets)
    generator = torch.Generator().manual_seed(8)
    tensors = {
        name: torch.empty(shape).normal_(0, 0.01, generator=generator) for name, shape in spec.checkpoint_shapes(config)
    }
    with build_directory(directory, "adapter", {}) as staging:
        write_adapter(staging, Adapter(spec, tensors))
    return directory


LAUNCH = """
import json, os, subprocess, sys, time
started, processor, peak = time.monotonic(), 0.0, 0.0
for command in json.loads(sys.argv[1]):
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command} ended with {status}")
    processor, peak = processor + used.ru_utime + used.ru_stime, max(peak, used.ru_maxrss / 1024)
print(json.dumps([time.monotonic() - started, processor, peak]))
"""
"""Started in a small process: the peak of a child is at least that of the process that started it."""


def run(*commands: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and the peak of the memory of the largest in MiB."""
    launch = [sys.executable, "-S", "-c", LAUNCH, json.dumps(commands)]
    seconds, processor, peak = json.loads(subprocess.run(launch, stdout=subprocess.PIPE, check=True).stdout)
    return seconds, processor, peak


def main() -> None:
    """Merge and copy, alternating, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk to measure; what is made there is removed")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, help="default: 4096, with 11008 in the feed-forward layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--format", choices=("hf", "meta"), default="hf")
    parser.add_argument("--shards", type=int, default=3, help="files of the base, as a 7B has; of hf alone")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    config = PRESETS["llama-2-7b"].with_layers(options.layers)
    if options.hidden is not None:
        heads, inner = options.hidden // 128, round(options.hidden * 11008 / 4096 / 256) * 256
        config = dataclasses.replace(
            config,
            hidden_size=options.hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
    size = 2 * sum(torch.Size(shape).numel() for _, shape in config.parameter_shapes())
    options.directory.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(options.directory).free) < 2.2 * size:
        raise SystemExit(f"{2.2 * size:,.0f} bytes are needed and {free:,} are free")
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        base = make_base(Path(scratch) / "base", config, options.format, options.shards)
        adapter = make_adapter(Path(scratch) / "adapter", config, TARGETS[options.targets])
        output = Path(scratch) / "output"
        files = sorted(path.name for path in base.iterdir())
        copies = [str(output / name) for name in files]
        python = [sys.executable, "-c"]
        merge = [sys.executable, "-m", "llamatune", "merge-lora", "--model", str(base), "--adapter", str(adapter)]
        ways = {
            "cp and sync": [["cp", "-r", str(base), str(output)], ["sync", *copies]],
            "llamatune": [[*merge, "--output", str(output)]],
            "starting it": [[*python, "import llamatune.cli, llamatune.checkpoints.merging"]],
        }
        if options.peer:
            sync = "import os, sys, pathlib\nfor path in pathlib.Path(sys.argv[1]).iterdir():\n"
            sync += "    os.fsync(os.open(path, os.O_RDONLY))"
            peer = [*python, PEER, str(base), str(adapter), str(output)]
            ways["PEFT"] = [peer, [*python, sync, str(output)]]
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, commands in ways.items():
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                results[name].append(run(*commands))
        report(results, f"{size:,} bytes in {len(files)} files, {options.targets}, {options.format}")


def report(results: dict[str, list[tuple[float, float, float]]], title: str) -> None:
    """A line for each way: medians, the range of the times, the ratio to the copy of the same round."""
    sys.stdout.write(f"{title}\n")
    copied = [seconds for seconds, _, _ in results["cp and sync"]]
    for name, runs in results.items():
        seconds, processor, mib = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [run[0] / copy for run, copy in zip(runs, copied, strict=True)]
        took = f"{seconds:.2f} s ({min(run[0] for run in runs):.2f}-{max(run[0] for run in runs):.2f})"
        ratio = f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        sys.stdout.write(f"  {name:12} {took}, processor {processor:.2f} s, {mib:.0f} MiB, {ratio}\n")


if __name__ == "__main__":
    main()

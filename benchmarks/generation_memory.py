"""Peak memory of ``generate`` on a CPU, each case in a process of its own, beside what ``plan-memory --generate`` says.

``python benchmarks/generation_memory.py [--only NAME]`` writes models of random weights, about 1.2 GB, to a temporary
directory. Measured is the most resident memory less that before the model is opened, in a process that has generated
with a tiny model, so that imports and what torch sets up are not in it. It is measured twice: as glibc's allocator
is, which keeps some of what is freed, and where it gives back every tensor (``MALLOC_MMAP_THRESHOLD_``). Ratios are to
the prediction, and to weights, keys and values alone. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from against_transformers import SHAPES, say
from material import DTYPES, make_base

from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.demo.run_demo import MATERIAL
from llamatune.host_memory import give_back
from llamatune.inference.generate import generate
from llamatune.inference.model_source import open_model
from llamatune.inference.prompt_encoding import PromptEncoder
from llamatune.math_library_variables import prepare_math_libraries
from llamatune.memory.generation import HeldModel, Work, plan_generation


class Case(NamedTuple):
    """A shape, the precision that is stored, ``--dtype``, prompts of so many words, new tokens, and temperature."""

    shape: str
    stored: str
    dtype: str
    prompts: int
    words: int
    new_tokens: int
    temperature: float = Sampling.temperature

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.stored}, --dtype {self.dtype}, {self.prompts} x {self.words} words"


CASES = (
    Case("15m", "fp32", "same", 1, 60, 128),
    Case("15m", "fp32", "same", 16, 60, 128),
    Case("15m", "fp32", "same", 40, 60, 128),
    Case("15m", "fp32", "same", 1, 1500, 128),
    Case("15m", "bf16", "same", 16, 60, 128, 0.0),
    Case("0.5b", "bf16", "same", 1, 60, 32),
    Case("0.5b", "bf16", "same", 16, 60, 32),
    Case("0.5b", "bf16", "same", 1, 1500, 32),
    Case("0.5b", "bf16", "float32", 1, 60, 32),
    Case("0.5b", "bf16", "int8", 16, 60, 32),
)


def status_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii")
    return int(lines.split(f"{name}:")[1].split()[0]) * 1024


def measure(case: Case, base: Path) -> dict[str, Any]:
    """Generate in this process: the bytes that it took at most, and the tokens of the longest prompt."""
    dtype = DTYPES[case.stored][0] if case.dtype == "same" else case.dtype  # the tiny model is stored in another
    source, tiny = (
        ModelSource(model=path, dtype=held, device="cpu")  # type: ignore[arg-type]
        for path, held in ((base, case.dtype), (MATERIAL / "base", dtype))
    )
    prompt = " ".join(["word"] * case.words)
    sampling = Sampling(case.new_tokens, temperature=case.temperature)
    generate(tiny, [prompt[:80]] * case.prompts, sampling)
    opened = open_model(source)
    tokenizer = opened.tokenizer()
    tokens = len(PromptEncoder(tokenizer, None).segments(prompt, 1).encode(tokenizer)[0])
    give_back()  # or what the tiny model has left would be used again, and not be counted
    before = status_bytes("VmRSS")
    made = generate(source, [prompt] * case.prompts, sampling)
    lengths = [len(one.completion_ids) for one in made.results]
    return {"peak": status_bytes("VmHWM") - before, "prompt_tokens": tokens, "new_tokens": max(lengths)}


def main() -> None:
    """The command line; ``--child`` is a case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        say(json.dumps(measure(Case(*json.loads(arguments.child[0])), Path(arguments.child[1]))))
        return
    prepare_math_libraries()  # as the command line does, before torch is loaded
    say("| case | prompt + new tokens | predicted MiB | measured MiB | over predicted | over weights, keys, values | "
        "measured MiB, all given back | over predicted |")  # fmt: skip
    say("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if arguments.only not in case.name:
                continue
            base = Path(scratch) / f"{case.shape}-{case.stored}"
            config = dataclasses.replace(SHAPES[case.shape], max_position_embeddings=8192)
            if not base.exists():
                make_base(base, config, DTYPES[case.stored][1], MATERIAL / "base" / "tokenizer.model")
            command = [sys.executable, __file__, "--child", json.dumps(case), str(base)]
            kept, given_back = (
                json.loads(
                    subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | more).stdout
                )
                for more in ({}, {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)})
            )
            prompt_tokens, stored = kept["prompt_tokens"], DTYPES[case.stored][0]
            dtype = stored if case.dtype == "same" else case.dtype
            model = HeldModel(config, dtype, "bfloat16" if dtype == "int8" else dtype, stored)
            work = Work(prompt_tokens, case.new_tokens, prompts=case.prompts, draws=case.temperature > 0)
            plan = plan_generation(model, work)
            held, predicted = plan.moments["decoding"], plan.memory.peak
            least, peaks = held.weights + held.keys_and_values, (kept["peak"], given_back["peak"])
            sizes = [f"{size / 2**20:,.1f}" for size in (predicted, *peaks)]
            ratios = [f"{size / predicted:.3f}" for size in peaks]
            lengths = f"{prompt_tokens:,} + {kept['new_tokens']}"
            cells = [case.name, lengths, *sizes[:2], ratios[0], f"{peaks[0] / least:.3f}", sizes[2], ratios[1]]
            say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

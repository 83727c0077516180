"""Compares generation with transformers' ``generate`` and continuous batching, and llama.cpp; reports ratios.

``python benchmarks/against_transformers.py --shape 15m --rounds 3``: one prompt, then many prompts of ragged lengths
with answers of ragged lengths, greedy, from the same random weights, alternating. The length of each answer is drawn
from an exponential distribution whose mean is a quarter of the longest; ``generate`` computes a batch until its longest
answer ends. Seconds are compared for each token that is asked for; a ratio above 1 means that llamatune needs less.
Nothing is downloaded. ``--prompt-tokens 88 1024`` are the lengths of prompts whose first token is timed.

With ``--held int8`` llamatune's weights are quantised, and answers differ. ``--int8-peers torchao`` adds, for one
prompt, transformers with weights in int8 by torchao, quanto or bitsandbytes, which must be installed.

``--tokenizer tokenizer.model``: beside llama.cpp, too, which needs llama-cpp-python. It reads the same weights in the
same dtype, or in Q8_0 for ``--held int8``, from a GGUF file, which a tokenizer belongs to.

``--only lookup``: with drafts and without, of a model that copies its prompt, that never repeats itself, and that never
goes on as the prompt does where the same tokens stand.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from material import DTYPES, make_base
from torch import Tensor

from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.command_options.conversion import ConvertOptions
from llamatune.command_options.inference import Sampling
from llamatune.events import ignore_event, never_stop
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.model.transformer import Transformer
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.threads import suitable_threads

SHAPES = {
    "15m": LlamaConfig(288, 768, 6, 6, 6, 32000, max_position_embeddings=2048),
    "0.5b": LlamaConfig(1024, 4096, 24, 16, 8, 32000, max_position_embeddings=2048),
}
INT8_PACKAGES = ("torchao", "quanto", "bitsandbytes")
Ids = list[int]
Side = Callable[[list[Ids], list[int]], list[Ids]]
"""New ids of prompts, as many of each as is said."""


def say(line: str) -> None:
    """At once, so that a long comparison can be followed."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def ours(model: Any, rows: int, lookup: bool = False) -> Side:
    """llamatune's engine, with drafts as ``generate --lookup on`` makes them, or without."""

    def side(prompts: list[Ids], lengths: list[int]) -> list[Ids]:
        with suitable_threads(model.config, min(rows, len(prompts))):
            drafts = PromptLookup(in_16_bits=True) if lookup else None
            engine = Engine(model, (), rows, lookup=drafts)
            for prompt, length in zip(prompts, lengths, strict=True):
                engine.add(prompt, Sampling(length, temperature=0))
            ended: dict[int, Completion] = {}
            while not engine.is_done:
                ended.update(engine.step())
            return [ended[number].ids for number in range(len(prompts))]

    return side


def batches(model: Any, rows: int) -> Side:
    """``generate`` in batches, padded on the left."""

    def side(prompts: list[Ids], lengths: list[int]) -> list[Ids]:
        found: list[Ids] = []
        for first in range(0, len(prompts), rows):
            batch, asked = prompts[first : first + rows], lengths[first : first + rows]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            model.generation_config.eos_token_id = None
            with torch.inference_mode():
                made: Tensor = model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=max(asked), pad_token_id=0
                )
            found += [row[width : width + length].tolist() for row, length in zip(made, asked, strict=True)]
        return found

    return side


def continuous(model: Any) -> Side:
    """transformers' continuous batching, with its defaults."""
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    def side(prompts: list[Ids], lengths: list[int]) -> list[Ids]:
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
        )
        hints = WorkloadHints(max(map(len, prompts)), max(lengths), len(prompts))
        made: dict[str, Ids] = {}
        with model.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=5, workload_hints=hints
        ) as manager:
            asked = [
                manager.add_request(prompt, max_new_tokens=length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            while len(made) < len(asked):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    made[output.request_id] = list(output.generated_tokens)
        return [made[request] for request in asked]

    return side


def in_int8(base: Path, dtype: torch.dtype, package: str) -> Any:
    """transformers' model whose linear layers hold int8, by one of ``INT8_PACKAGES``, and compute in ``dtype``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        settings = QuantoConfig(weights="int8") if package == "quanto" else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=settings, device_map="cpu"
    ).eval()


def llama_cpp(file: Path) -> Side:
    """llama.cpp of one prompt at a time, on torch's number of threads."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def side(prompts: list[Ids], lengths: list[int]) -> list[Ids]:
        found = []
        for prompt, length in zip(prompts, lengths, strict=True):
            model.reset()
            found.append(list(itertools.islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), length)))
        return found

    return side


def compare(name: str, sides: dict[str, Side], work: tuple[list[Ids], list[int]], rounds: int) -> None:
    """Print tokens/s of each side, and the ratios of each round to ours."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    tokens = sum(work[1])
    expected: list[Ids] | None = None
    for number in range(rounds + 1):  # the first warms up
        for side, generate in sides.items():
            started = time.perf_counter()
            found = generate(*work)
            taken = time.perf_counter() - started
            expected = expected or found
            assert list(map(len, found)) == work[1], side
            same = sum(one == other for one, other in zip(found, expected, strict=True))
            if number == 0:
                say(f"{name}: {side}: {same} of {len(found)} answers as llamatune's, {tokens} tokens")
            else:
                seconds[side].append(taken / tokens)
    for side, times in seconds.items():
        ratios = [other / own for own, other in zip(seconds["llamatune"], times, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        say(f"| {name} | {side} | {1 / statistics.median(times):.0f} tokens/s | {ratio} |")


def held_in(base: Path, dtype: torch.dtype, kind: str | None) -> Transformer:
    """A model whose blocks are quantised, or not, and the rest in ``dtype``."""
    checkpoint = open_checkpoint(base)
    source = None
    if kind is not None:
        source = QuantizedBase(kind, checkpoint, checkpoint.config, torch.device("cpu"), ignore_event, never_stop)
    return load_model(checkpoint, dtype, quantized=source, joined=True).eval()


def compare_lookup(model: Any, tokens: int, rounds: int) -> None:
    """One prompt with drafts and without; ``model`` is made to go around two cycles of tokens, whatever its blocks add.

    The blocks are computed as before, but add zeros, and the head's row of a token is what comes before it embedded.
    """
    period, vocabulary = 60, model.config.vocab_size
    order = list(range(3, vocabulary))
    random.Random(2).shuffle(order)
    short, long = order[:period], order[period:]
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedded = model.model.embed_tokens.weight
        for cycle in (short, long):
            model.lm_head.weight[cycle] = embedded[[cycle[-1], *cycle[:-1]]]
    misled = [id for place in range(tokens) for id in (long[place], long[place + 1], 1)]
    prompts = {"copying": short, "not repeating": long[:period], "misled": [*misled, long[0]]}
    sides = {"llamatune": ours(model, 1, lookup=True), "without drafts": ours(model, 1)}
    for name, prompt in prompts.items():
        compare(name, sides, ([prompt], [tokens]), rounds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--held", choices=QUANTIZED_DTYPES, help="what llamatune's weights are quantised to")
    parser.add_argument("--int8-peers", nargs="+", choices=INT8_PACKAGES, default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=ROWS_AT_ONCE["cpu"], help="that llamatune computes together")
    parser.add_argument("--batch", type=int, default=16, help="that generate computes together")
    parser.add_argument("--tokens", type=int, default=128, help="the most of an answer")
    parser.add_argument(
        "--prompt-tokens", nargs="+", type=int, default=[88], help="of prompts whose first token is timed"
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model of 32,000 pieces, for llama.cpp")
    parser.add_argument("--only", choices=["single", "many", "lookup"])
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    config, dtype = SHAPES[arguments.shape], DTYPES[arguments.dtype][1]
    chance = random.Random(1)
    others: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", config, dtype, arguments.tokenizer)
        model = held_in(base, dtype, arguments.held)
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        for package in arguments.int8_peers if arguments.only in (None, "single") else ():
            others[f"generate, int8 by {package}"] = batches(in_int8(base, dtype, package), 1)
        if arguments.tokenizer is not None:
            file = Path(scratch) / "base.gguf"
            convert(ConvertOptions(base, file, dtype="q8_0" if arguments.held == "int8" else "same"))
            others["llama.cpp"] = llama_cpp(file)
    prompts = [[1, *(chance.randrange(3, config.vocab_size) for _ in range(chance.randrange(4, 120)))]
               for _ in range(arguments.prompts)]  # fmt: skip
    lengths = [min(arguments.tokens, 1 + int(chance.expovariate(4 / arguments.tokens))) for _ in prompts]
    if arguments.only in (None, "single"):
        sides = {"llamatune": ours(model, 1), "generate": batches(theirs, 1), **others}
        compare("one prompt", sides, (prompts[:1], [arguments.tokens]), arguments.rounds)
        for tokens in arguments.prompt_tokens:
            prompt = (prompts[0] * tokens)[:tokens]
            compare(f"first token behind {tokens}", sides, ([prompt], [1]), arguments.rounds * 4)
    if arguments.only in (None, "many"):
        sides = {"llamatune": ours(model, arguments.rows), "generate": batches(theirs, arguments.batch),
                 "continuous batching": continuous(theirs)}  # fmt: skip
        compare(f"{arguments.prompts} prompts", sides, (prompts, lengths), arguments.rounds)
    if arguments.only in (None, "lookup"):
        compare_lookup(model, arguments.tokens, arguments.rounds * 4)


if __name__ == "__main__":
    main()

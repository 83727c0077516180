"""Memory of a training step of LLaMA-2-7B: llamatune and transformers + PEFT, measured by the same meter.

``python benchmarks/memory.py [--peer] [--spec KEY=VALUE]`` needs no GPU. It prints GiB of tensors at the peak and KiB
kept for the backward pass per token and layer: bf16 or NF4 base, fp32 adapters of rank 16, AdamW's state, 46 % of the
tokens trained. ``--device cuda --output DIR`` runs the same steps on a GPU, each in a process of its own, and writes
the peak of what torch allocated and reserved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import SETTINGS, Bench, add_options
from drawn_base import start_of
from material import ALPHA, SHAPES, TARGETS, R
from step_meter import TARGET_SHARE, StepMeter, measure_step
from tables import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from llamatune.memory.plan import plan_memory
from llamatune.memory.sizes import Rows
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import build_spec


class Row(NamedTuple):
    """One line: target modules, micro-batch, ``training.activation_checkpointing`` and ``model.dtype``."""

    targets: str
    rows: int
    tokens: int
    mode: str
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        base = "NF4: " if self.dtype == "nf4" else ""
        targets = {"qv": "q,v", "all": "all seven"}[self.targets]
        return f"{base}{self.rows} x {self.tokens}, {targets}, {'nothing' if self.mode == 'none' else self.mode}"


ROWS = (
    Row("qv", 1, 512, "none"),
    Row("all", 1, 512, "none"),
    Row("qv", 8, 512, "none"),
    Row("all", 8, 512, "none"),
    Row("all", 8, 512, "feed_forward"),
    Row("qv", 8, 512, "projections"),
    Row("all", 8, 512, "projections"),
    Row("qv", 8, 512, "block"),
    Row("all", 8, 512, "block"),
    Row("qv", 8, 2048, "block"),
    Row("qv", 1, 512, "none", "nf4"),
    Row("all", 1, 512, "none", "nf4"),
    Row("qv", 8, 512, "block", "nf4"),
    Row("all", 8, 512, "block", "nf4"),
)


def ours(overrides: list[str], row: Row) -> tuple[float, float]:
    """Peak GiB and saved KiB per token and layer of llamatune's step."""
    values = {
        "model": {"path": "none", "init": "random", "dtype": row.dtype},
        "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(TARGETS[row.targets])},
        "data": {"train": "none"},
        "training": {"output_dir": "none", "gradient_accumulation_steps": 1, "activation_checkpointing": row.mode,
                     "device": "cpu"},
    }  # fmt: skip
    measured = measure_step(build_spec(values, "benchmark", overrides), SHAPES["7b"], row.rows, row.tokens)
    return measured.peak_bytes / 2**30, measured.saved_bytes_per_token_layer / 2**10


def has_peer(row: Row) -> bool:
    """PEFT recomputes blocks or nothing; the meter cannot see into the kernels of its 4-bit base (bitsandbytes)."""
    return row.dtype == "bfloat16" and row.mode in ("none", "block")


def theirs(row: Row) -> tuple[float, float]:
    """The same for a step of transformers + PEFT with their defaults (no autocast, all logits)."""
    shape, (targets, rows, tokens, mode, _) = SHAPES["7b"], row
    peak, _ = peer_step(shape, targets, rows, tokens, mode)
    (_, one), (_, two) = (peer_step(shape.with_layers(n), targets, rows, tokens, mode) for n in (1, 2))
    return peak / 2**30, (two - one) / (rows * tokens) / 2**10


def give_storage(model: torch.nn.Module) -> None:
    """Replace tensors on the meta device by new ones (of the active mode); an adapter is fp32, as in PEFT."""
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if tensor.requires_grad else tensor.dtype
            setattr(module, name, torch.nn.Parameter(torch.empty(tensor.shape, dtype=dtype), tensor.requires_grad))
        for name, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))


def peer_step(config: LlamaConfig, targets: str, rows: int, tokens: int, mode: str) -> tuple[int, int]:
    """Peak bytes of a step, and bytes that its forward pass keeps."""
    import transformers
    from peft import LoraConfig, get_peft_model

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    shape = transformers.LlamaConfig(**{name: getattr(config, name) for name in names})
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[targets]), task_type="CAUSAL_LM")
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
        model: Any = get_peft_model(base, lora)
    with FakeTensorMode(allow_non_fake_inputs=True), StepMeter() as meter:
        give_storage(model)
        model.train()
        if mode != "none":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
        ids, resident = torch.ones(rows, tokens, dtype=torch.int64), 0
        for _ in range(2):
            resident = meter.live_bytes
            meter.start_window()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss
    assert meter.backward_began_bytes is not None
    return meter.peak_bytes, meter.backward_began_bytes - resident


def without_gpu(options: argparse.Namespace) -> None:
    """Print a Markdown table, line by line."""
    heads = ["setting", "llamatune GiB", "KiB/token/layer", "seconds to measure"]
    heads += ["PEFT GiB", "KiB/token/layer"] if options.peer else []
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for row in ROWS:
        started = time.monotonic()
        peak, saved = ours(options.spec, row)
        line = f"| {row.name} | {peak:.2f} | {saved:.1f} | {time.monotonic() - started:.0f} |"
        if options.peer:
            line += " {:.2f} | {:.1f} |".format(*theirs(row)) if has_peer(row) else " | |"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def on_device(bench: Bench, table: Table) -> None:
    """Three real steps of each row, each side in a process of its own."""
    for row in ROWS:
        on_device_row(bench, table, row)


def on_device_row(bench: Bench, table: Table, row: Row) -> None:
    """Three real steps of one row on each side; what the plan predicts for llamatune is noted."""
    shape, tokens = bench.options.shape, bench.tokens(row.tokens)
    spec = bench.spec(shape, row.targets, None, row.rows, dtype=row.dtype, activation_checkpointing=row.mode)
    reports = [bench.steps({"llamatune": spec}, None, shape, row.rows, tokens, rounds=3)]
    if has_peer(row):
        setting = SETTINGS["Trainer, batch 8"]._replace(checkpointing=row.mode != "none")
        theirs = bench.peer(shape, row.targets, setting)
        reports.append(bench.steps({}, theirs, shape, row.rows, tokens, rounds=3))
    for kind in ("memory", "reserved"):
        sizes = [run[f"peak_{kind}_bytes"] / 2**30 for run in reports if run[f"peak_{kind}_bytes"]]
        if sizes:
            theirs_gib = sizes[1] if len(sizes) > 1 else None
            table.row(f"peak {kind}, GiB, {row.name}", sizes[0], theirs_gib, [x / sizes[0] for x in sizes[1:]], None)
    if bench.options.device == "cuda":
        config, rows = SHAPES[shape], Rows((tokens,) * row.rows, row.rows * round(tokens * TARGET_SHARE), 1)
        capability = torch.cuda.get_device_capability()
        planned = plan_memory(build_spec(start_of(spec)[0], "benchmark"), config, rows, capability, None).step.peak
        measured = reports[0]["peak_memory_bytes"] / planned
        table.row(f"the plan, GiB, {row.name}; ratio: measured over planned", planned / 2**30, None, [measured], None)


def main() -> None:
    """Measure without a GPU, or on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="transformers + PEFT too, without a GPU")
    parser.add_argument("--steps", action="store_true", help="run real steps on --device, the default on a GPU")
    add_options(parser, output_required=False)
    options = parser.parse_args()
    if options.device == "cpu" and not options.steps:
        return without_gpu(options)
    options.shape = options.shape or "7b"
    table = Table(options.output, " ".join(sys.argv))
    with tempfile.TemporaryDirectory() as scratch:
        return on_device(Bench(options, Path(scratch)), table)


if __name__ == "__main__":
    main()

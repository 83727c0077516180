"""The memory of a step of LLaMA-2-7B, llamatune and transformers + PEFT by one meter, without a GPU.

``python benchmarks/memory.py [--peer] [--spec KEY=VALUE]`` prints GiB of tensors at the peak and KiB kept for the
backward pass per token and layer: bf16 base, fp32 adapters of rank 16, AdamW's state, 46 % of the tokens trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from material import ALPHA, SHAPES, TARGETS, R
from torch._subclasses.fake_tensor import FakeTensorMode

from llamatune.model.config import LlamaConfig
from llamatune.spec import build_spec
from llamatune.training.memory_gate import StorageMeter, measure_step

SETTINGS = (  # targets, rows, row tokens, activation checkpointing
    ("qv", 1, 512, "none"),
    ("all", 1, 512, "none"),
    ("qv", 8, 512, "none"),
    ("all", 8, 512, "none"),
    ("qv", 8, 512, "block"),
    ("qv", 8, 2048, "block"),
)


def ours(overrides: list[str], targets: str, rows: int, tokens: int, mode: str) -> tuple[float, float]:
    """Peak GiB and saved KiB per token and layer of the loop's own step."""
    values = {
        "model": {"path": "none", "init": "random"},
        "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(TARGETS[targets])},
        "data": {"train": "none"},
        "training": {"output_dir": "none", "gradient_accumulation_steps": 1, "activation_checkpointing": mode,
                     "device": "cpu"},
    }  # fmt: skip
    measured = measure_step(build_spec(values, "benchmark", overrides), SHAPES["7b"], rows, tokens)
    return measured.peak_bytes / 2**30, measured.saved_bytes_per_token_layer / 2**10


def theirs(targets: str, rows: int, tokens: int, mode: str) -> tuple[float, float]:
    """The same of a plain step of transformers + PEFT at their defaults (no autocast, every logit)."""
    peak, _ = peer_step(SHAPES["7b"], targets, rows, tokens, mode)
    (_, one), (_, two) = (peer_step(SHAPES["7b"].with_layers(n), targets, rows, tokens, mode) for n in (1, 2))
    return peak / 2**30, (two - one) / (rows * tokens) / 2**10


def give_storage(model: torch.nn.Module) -> None:
    """Put tensors of the mode that is on in the place of those on the meta device; an adapter in fp32, as PEFT does."""
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if tensor.requires_grad else tensor.dtype
            setattr(module, name, torch.nn.Parameter(torch.empty(tensor.shape, dtype=dtype), tensor.requires_grad))
        for name, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))


def peer_step(config: LlamaConfig, targets: str, rows: int, tokens: int, mode: str) -> tuple[int, int]:
    """Peak bytes of a step, and bytes that its forward pass left alive."""
    import transformers
    from peft import LoraConfig, get_peft_model

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    shape = transformers.LlamaConfig(**{name: getattr(config, name) for name in names})
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[targets]), task_type="CAUSAL_LM")
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
        model: Any = get_peft_model(base, lora)
    with FakeTensorMode(allow_non_fake_inputs=True), StorageMeter() as meter:
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


def main() -> None:
    """Print a Markdown table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="transformers + PEFT too")
    parser.add_argument("--spec", action="append", default=[], metavar="KEY=VALUE", help="for llamatune's run spec")
    options = parser.parse_args()
    heads = ["setting", "llamatune GiB", "KiB/token/layer", "seconds to find out"]
    heads += ["PEFT GiB", "KiB/token/layer"] if options.peer else []
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for setting in SETTINGS:
        started = time.monotonic()
        peak, saved = ours(options.spec, *setting)
        targets, rows, tokens, mode = setting
        line = f"| {rows} x {tokens}, {targets}, {mode} | {peak:.2f} | {saved:.1f} | {time.monotonic() - started:.0f} |"
        if options.peer:
            peak, saved = theirs(*setting)
            line += f" {peak:.2f} | {saved:.1f} |"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

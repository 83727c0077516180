"""Inputs of both sides of a comparison: a base of random weights, an adapter to start from, prepared rows."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_path
from llamatune.shapes.presets import PRESETS

DTYPES = {"bf16": ("bfloat16", torch.bfloat16), "fp32": ("float32", torch.float32)}
"""By ``training.precision``: the name of ``model.dtype``, and torch's dtype."""
TARGETS = {"qv": ("q_proj", "v_proj"), "all": LINEAR_MODULES}
SHAPES = {
    "50m": LlamaConfig(512, 1376, 6, 8, 8, 32000),
    "tiny": LlamaConfig(64, 176, 2, 4, 4, 32000),
    "dense": LlamaConfig(768, 2048, 4, 12, 12, 768),  # the head is 2 % of it, as in the 7B model
    "dense-32k": LlamaConfig(768, 2048, 4, 12, 12, 32000),
    "7b": PRESETS["llama-2-7b"],
    "8b": PRESETS["llama-3-8b"],
    "7b-2-layers": PRESETS["llama-2-7b"].with_layers(2),  # to try what is measured on 7b and 8b
    "8b-2-layers": PRESETS["llama-3-8b"].with_layers(2),
}
R, ALPHA = 16, 32


def make_base(
    directory: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: Path | None = None, device: str = "cpu"
) -> Path:
    """A Hugging Face directory of weights from N(0, 0.02²), one file a block, so that one block is in memory."""
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(7)
    index: dict[str, str] = {}
    total = 0

    def draw(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        drawn = torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator)
        return drawn.to(dtype).cpu()

    by_block = itertools.groupby(config.parameter_shapes(), lambda item: ".".join(item[0].split(".")[:3]))
    for number, (_, shapes) in enumerate(by_block):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: draw(shape) for name, shape in shapes}
        index.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    write_config(directory, config, dtype, tokenizer)
    return directory


def write_config(directory: Path, config: LlamaConfig, dtype: torch.dtype, tokenizer: Path | None = None) -> None:
    """Hugging Face's ``config.json`` of a shape, and a tokenizer beside it: a directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "head_dim")  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    dtype_name = str(dtype).removeprefix("torch.")
    values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
               "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": dtype_name}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    if tokenizer is not None:
        shutil.copy(tokenizer, directory / "tokenizer.model")


def make_adapter(directory: Path, config: LlamaConfig, targets: tuple[str, ...]) -> Path:
    """The PEFT directory that both sides start from: A uniform within 1/sqrt(in), B zero."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            rows, columns = config.linear_shape(target)
            bound = 1 / math.sqrt(columns)
            prefix = f"base_model.model.model.layers.{layer}.{linear_path(target)}"
            drawn = torch.empty(R, columns).uniform_(-bound, bound, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = drawn
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(rows, R)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0,
              "target_modules": list(targets), "bias": "none", "inference_mode": True,
              "base_model_name_or_path": None}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


def make_prepared(directory: Path, rows: Path, tokenizer: Path, limit: int | None) -> Path:
    """The rows, encoded once for both sides."""
    prepare_data(PrepareOptions(rows=[rows], tokenizer=tokenizer, output=directory, limit=limit))
    return directory


@dataclass(frozen=True)
class Row:
    """Token ids of one row, and its labels (-100: no target)."""

    input_ids: list[int]
    labels: list[int]


def read_rows(prepared: Path) -> list[Row]:
    """The training rows of a prepared directory, read from its tensors."""
    tensors = load_file(prepared / "train.safetensors")
    ids, mask, starts = (tensors[name].tolist() for name in ("input_ids", "loss_mask", "offsets"))
    return [
        Row(ids[a:b], [i if m else -100 for i, m in zip(ids[a:b], mask[a:b], strict=True)])
        for a, b in itertools.pairwise(starts)
    ]


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, T), padded on the right to the longest."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [2] * (width - len(row.input_ids)) for row in rows])
    return ids, torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])

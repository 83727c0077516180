"""The judges: transformers' LLaMA, and PEFT on top of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.loading import load_model
from llamatune.model.adapters.apply import apply_adapter, load_adapter_tensors
from llamatune.model.transformer import Transformer

IDS = torch.tensor([[1, 5, 30, 9, 77, 4, 12, 51, 8, 8, 63, 2, 40], [1, 3, 3, 70, 11, 25, 90, 6, 6, 44, 19, 37, 89]])


def reference_logits(base: Path, ids: Tensor = IDS, adapter: Path | None = None) -> Tensor:
    """Logits in fp32 as transformers, and PEFT where there is an adapter, compute them."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model with an adapter on it."""
    model, found = load_model(base, dtype), load_adapter(adapter)
    apply_adapter(model, dataclasses.replace(found.config, dropout=0.0))
    load_adapter_tensors(model, found.tensors)
    return model.eval()

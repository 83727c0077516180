"""Writes the model in a GGUF file as a directory of transformers 5: bfloat16, dequantised."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

file, output = map(Path, sys.argv[1:])
named = {"gguf_file": file.name}
dequantize = GgufConfig(dequantize=True, **named)
model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, quantization_config=dequantize, **named)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(output)
AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(output)

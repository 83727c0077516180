"""Example values for ``explain KEY``, of those keys of the run spec whose default is none, null or empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY_EXAMPLES: Mapping[str, Any] = {
    "model.path": "models/llama-2-7b",
    "model.quantized_cache": "cache/llama-2-7b-nf4",
    "model.variant": "fp16",
    "model.num_layers": 2,
    "lora.ranks": {"q_proj": 8},
    "lora.alphas": {"q_proj": 16},
    "lora.modules_to_save": ["embed_tokens", "lm_head"],
    "lora.init_from": "runs/first/adapter",
    "lora.rank_pattern": {"q_proj": 8},
    "lora.alpha_pattern": {"q_proj": 16},
    "data.train": "prepared/alpaca",
    "data.validation": "prepared/validation",
    "training.output_dir": "runs/alpaca",
    "training.num_epochs": 3,
    "training.max_steps": 1000,
    "training.learning_rate": 2e-4,
    "training.warmup_ratio": 0.03,
    "training.max_time": "1h30m",
    "training.profile_steps": 10,
    "training.save_every_steps": 200,
    "evaluation.every_steps": 100,
    "evaluation.prompts": 4,
    "evaluation.early_stopping_patience": 3,
    "tracking.wandb": "offline",
    "tracking.wandb_name": "alpaca-r16",
}

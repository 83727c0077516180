"""The techniques of a training step, as values of dimensions, and few cases that hold each pair of values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "checkpointing": ("none", "block", "every_2", "attention", "feed_forward", "sublayer", "projections"),
    "dtype": ("float32", "bfloat16", "float16", "nf4", "float8"),
    "rows": ("one", "equal", "ragged", "packed"),
    "precision": ("fp32", "bf16", "fp16", "tf32"),
    "blocks": ("fused", "plain"),
    "optimizer": ("adamw", "sgd", "adamw_8bit"),
    "trained": ("q and v", "all seven, dropout", "everything"),
    "capability": ("9.0", "8.0", "7.5"),
    "heads": ("alike", "grouped", "grouped, of 12"),
    "placement": ("device", "host"),
    "embedding": ("untied", "tied"),
    "watched": ("no", "norms of layers"),
    "sums": ("in any order", "deterministic"),
}
Technique = dict[str, str]
Pair = frozenset[tuple[str, str]]

REFUSED: set[Pair] = {
    frozenset(pair)
    for pair in [
        *((("trained", "everything"), ("dtype", dtype)) for dtype in ("bfloat16", "float16", "nf4", "float8")),
        (("trained", "everything"), ("checkpointing", "projections")),
        (("trained", "everything"), ("placement", "host")),
        (("blocks", "plain"), ("checkpointing", "projections")),
        (("capability", "7.5"), ("dtype", "bfloat16")),
        (("capability", "7.5"), ("precision", "bf16")),
        (("capability", "7.5"), ("precision", "tf32")),
    ]
}
"""Pairs of values that the program refuses to train."""

_TRIES, _CANDIDATES = 200, 12


def pairs_of(technique: Mapping[str, str]) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(technique.items(), 2)}


def all_pairs() -> set[Pair]:
    """Every pair of values of two dimensions that is not refused."""
    wanted = set[Pair]()
    for (one, values), (other, others) in itertools.combinations(DIMENSIONS.items(), 2):
        wanted |= {frozenset(((one, a), (other, b))) for a in values for b in others}
    return wanted - REFUSED


def covering_set(seed: int = 32) -> list[Technique]:
    """Techniques that hold each pair of ``all_pairs``, chosen greedily: the same ones in every process.

    The seed is that of the fewest techniques among some hundreds.
    """
    chance, left, chosen = random.Random(seed), all_pairs(), list[Technique]()
    while left:
        first = min(left, key=sorted)
        candidates = itertools.islice(_completions(dict(sorted(first)), left, chance), _CANDIDATES)
        best = max(candidates, key=lambda technique: len(pairs_of(technique) & left))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def _completions(begun: Technique, left: set[Pair], chance: random.Random) -> Iterator[Technique]:
    """Techniques that hold the values ``begun``, each other value the one that brings most of ``left``."""
    for _ in range(_TRIES):
        technique = dict(begun)
        for name in chance.sample(list(DIMENSIONS), len(DIMENSIONS)):
            if name in technique:
                continue
            allowed = {
                value: {frozenset(((name, value), item)) for item in technique.items()}
                for value in chance.sample(DIMENSIONS[name], len(DIMENSIONS[name]))
            }
            allowed = {value: new for value, new in allowed.items() if not new & REFUSED}
            if not allowed:
                break
            technique[name] = max(allowed, key=lambda value: len(allowed[value] & left))
        else:
            yield {name: technique[name] for name in DIMENSIONS}


def job_of(technique: Technique) -> dict[str, Any]:
    """What the process with the pretended GPU is to run, and on which GPU."""
    values = technique
    training: dict[str, Any] = {
        "output_dir": "none",
        "device": "cuda",
        "micro_batch_size": 3 if values["rows"] in ("equal", "ragged") else 1,
        "gradient_accumulation_steps": 2,
        "optimizer": values["optimizer"],
        "precision": values["precision"],
        "activation_checkpointing": values["checkpointing"],
        "fused": values["blocks"] == "fused",
        "log_layer_grad_norms": values["watched"] != "no",
        "deterministic": values["sums"] == "deterministic",
    }
    if values["optimizer"] == "sgd":
        training |= {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    spec: dict[str, Any] = {
        "model": {"path": "none", "init": "random", "dtype": values["dtype"], "placement": values["placement"]},
        "data": {"train": "none", "packing": values["rows"] == "packed", "packed_tokens": 14},
        "training": training,
    }
    # Of rank 48 some matrices are large enough for 8-bit state, and others are not.
    if values["trained"] == "q and v":
        spec["lora"] = {"r": 48, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    elif values["trained"] == "all seven, dropout":
        spec["lora"] = {"r": 48, "dropout": 0.1, "target_modules": "all-linear"}
    heads = {"alike": (6, 6, 16), "grouped": (6, 2, 16), "grouped, of 12": (8, 2, 12)}[values["heads"]]
    shape = {
        "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": heads[2], "vocab_size": 131,
        "tie_word_embeddings": values["embedding"] == "tied",
    }  # fmt: skip
    capability = [int(number) for number in values["capability"].split(".")]
    return {"kind": "step", "capability": capability, "spec": spec, "shape": shape, "rows": values["rows"]}

"""``training.learning_rate: auto`` against sweeps of seven rates: held-out regret on pairs of a model and rows.

Each pair is trained to its end at every rate of the sweep, then with ``auto``. Regret is the validation loss of the run
with ``auto`` over the lowest of the sweep, minus 1: below 0 the found rate is better than every one of the sweep.
Results are kept in ``--output`` as they come, and what is there is not trained again.

    python benchmarks/learning_rates.py --output DIR [--fixtures DIR] [--smollm2 DIR] [--only PAIR ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.errors import NumericsError
from llamatune.judging.general_texts import PACKAGED, read_documents
from llamatune.spec import RunSpec, build_spec
from llamatune.training.train import train

ROOT = Path(__file__).parents[1]
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The sweep, in steps of about the root of ten."""
ORDER: tuple[float | str, ...] = (*RATES, "auto")
ALL = "all-linear"


@dataclass(frozen=True)
class Pair:
    """``lora`` is None in full fine-tuning."""

    base: str
    rows: str
    lora: dict[str, Any] | None
    training: dict[str, Any]


PAIRS = {
    "stories260K, Alpaca, LoRA r=8": Pair(
        "stories", "alpaca", {"r": 8, "alpha": 16, "target_modules": ALL}, {"gradient_accumulation_steps": 2}
    ),
    "stories260K, GSM8K, LoRA r=16 on q, v": Pair(
        "stories", "gsm8k", {}, {"gradient_accumulation_steps": 4, "lr_scheduler": "linear", "warmup_ratio": 0.1}
    ),
    "stories260K, prose, full": Pair("stories", "prose", None, {"gradient_accumulation_steps": 4}),
    "demo base, demo rows, LoRA r=8": Pair(
        "demo", "demo", {"r": 8, "alpha": 16, "target_modules": ALL},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "warmup_steps": 5},
    ),
    "demo base, Alpaca, DoRA r=4": Pair(
        "demo", "alpaca", {"kind": "dora", "r": 4, "alpha": 8, "target_modules": ALL},
        {"gradient_accumulation_steps": 4},
    ),
    "demo base, GSM8K, LoRA r=64": Pair(
        "demo", "gsm8k", {"r": 64, "target_modules": ALL},
        {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"},
    ),
    "SmolLM2-135M, demo rows, LoRA r=8": Pair(
        "smollm2", "demo-90", {"r": 8, "target_modules": ALL}, {"max_steps": 10, "gradient_accumulation_steps": 4}
    ),
    "stories260K, GSM8K, full": Pair("stories", "gsm8k", None, {"gradient_accumulation_steps": 2}),
    "demo base, prose, full": Pair(
        "demo", "prose", None, {"gradient_accumulation_steps": 4, "lr_scheduler": "linear", "warmup_ratio": 0.1}
    ),
    "stories260K, prose, LoRA r=4": Pair(
        "stories", "prose", {"r": 4, "target_modules": ALL},
        {"gradient_accumulation_steps": 2, "lr_scheduler": "linear"},
    ),
    "demo base, Alpaca, LoRA r=16 on q, v": Pair("demo", "alpaca", {}, {"gradient_accumulation_steps": 4}),
}  # fmt: skip


def cut(text: str, characters: int) -> str:
    """The first words, so that rows are short."""
    return text if len(text) <= characters else text[:characters].rpartition(" ")[0]


def prompts(found: list[tuple[str, str]], count: int) -> list[dict[str, str]]:
    """Rows of short questions and answers."""
    return [{"prompt": f"{cut(q, 60)}\n", "completion": cut(a, 90)} for q, a in found if a][:count]


def rows_of(name: str, fixtures: Path) -> list[dict[str, str]]:
    """Short rows, without a template: tiny vocabularies need many tokens for one."""
    if name == "alpaca":
        rows = json.loads((fixtures / "data/alpaca_data_200.json").read_text())
        return prompts([(row["instruction"], row["output"]) for row in rows], 120)
    if name == "gsm8k":
        lines = (fixtures / "data/gsm8k_train.jsonl").read_text().splitlines()[:120]
        return prompts([(row["question"], row["answer"]) for row in map(json.loads, lines)], 120)
    if name == "prose":  # text that stays as it is, unlike a page of documentation
        pieces = [piece for text in read_documents(PACKAGED) for piece in wrap(text, 130)]
        return [{"text": piece} for piece in pieces if len(piece) > 80]
    lines = (ROOT / "llamatune/demo/instructions.jsonl").read_text().splitlines()
    found = [{"prompt": row["instruction"], "completion": f" {row['output']}"} for row in map(json.loads, lines)]
    return found[: 420 if name == "demo" else 90]


def prepared(pair: Pair, tokenizer: Path, fixtures: Path, output: Path) -> Path:
    """The rows of a pair, a seventh of them held out."""
    directory = output / "prepared" / f"{pair.base}-{pair.rows}"
    if not directory.exists():
        rows = output / f"{pair.rows}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(pair.rows, fixtures)))
        limits: dict[str, Any] = {"max_seq_length": 96, "validation_fraction": 0.15, "skip_bad_rows": 9}
        options = PrepareOptions([rows], tokenizer, directory, **limits)
        prepare_data(options, workers=1)
    return directory


def spec_of(pair: Pair, base: Path, data: Path, rate: float | str, run: Path) -> RunSpec:
    """One pass over the rows, in fp32."""
    training = {"output_dir": str(run), "learning_rate": rate, "precision": "fp32", "device": "cpu", **pair.training}
    if "max_steps" not in training:
        training["num_epochs"] = 1
    values: dict[str, Any] = {"model": {"path": str(base), "dtype": "float32"}, "data": {"train": str(data)}}
    values |= {"training": training, "evaluation": {"at_start": False}}
    if pair.lora is not None:
        values["lora"] = dict(pair.lora)
    return build_spec(values, "the pair")


def validation_loss(make: Callable[[Path], RunSpec], scratch: Path) -> dict[str, Any]:
    """What a whole run comes to; a diverged one has no loss."""
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    try:
        summary = train(make(run))
    except NumericsError:
        return {"loss": None}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    search = [event for event in events if event["event"] == "learning_rate_search"]
    facts = {"steps": summary["steps"], "loss": [e["loss"] for e in events if e["event"] == "eval"][-1]}
    return {**facts, **({"search": search[0]} if search else {})}


def measure(name: str, bases: dict[str, Path], fixtures: Path, output: Path) -> None:
    """Train a pair at all rates; each result is kept as it comes."""
    pair, kept = PAIRS[name], output / f"{list(PAIRS).index(name)}.json"
    base = bases[pair.base]
    data = prepared(pair, base, fixtures, output)
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for rate in ORDER:
        if str(rate) in results:
            continue
        scratch = output / f"scratch-{kept.stem}"
        results[str(rate)] = validation_loss(lambda run, rate=rate: spec_of(pair, base, data, rate, run), scratch)
        kept.write_text(json.dumps(results, indent=1))
        sys.stderr.write(f"{name} {rate} {results[str(rate)]}\n")
        sys.stderr.flush()


def table(output: Path) -> str:
    """Markdown: a line a pair, the loss at each rate, and the regret of ``auto``."""
    heads = ["pair", "steps", *(f"{rate:g}" for rate in RATES), "auto", "loss", "regret"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for number, name in enumerate(PAIRS):
        kept = output / f"{number}.json"
        results = json.loads(kept.read_text()) if kept.exists() else {}
        if not all(str(rate) in results for rate in ("auto", *RATES)):
            continue
        losses = [results[str(rate)]["loss"] for rate in RATES]
        best, auto = min(loss for loss in losses if loss is not None), results["auto"]
        shown = ["diverged" if loss is None else f"{loss:.4f}" for loss in losses]
        shown = [f"**{text}**" if loss == best else text for text, loss in zip(shown, losses, strict=True)]
        regret = f"{100 * (auto['loss'] / best - 1):+.1f} %"
        rate = f"{auto['search']['learning_rate']:g}"
        lines.append(f"| {' | '.join([name, str(auto['steps']), *shown, rate, format(auto['loss'], '.4f'), regret])} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--fixtures", type=Path, default=ROOT.parent / "shared/fixtures")
    parser.add_argument("--smollm2", type=Path, help="a Hugging Face directory; without it, no such pair")
    parser.add_argument("--only", nargs="*", help="words of the pairs' names")
    parser.add_argument("--table", action="store_true", help="train nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    bases = {"stories": given.fixtures / "stories260K-hf", "demo": ROOT / "llamatune/demo/base"}
    if given.smollm2 is not None:
        bases["smollm2"] = given.smollm2
    for name, pair in PAIRS.items():
        wanted = given.only is None or any(word in name for word in given.only)
        if wanted and pair.base in bases and not given.table:
            measure(name, bases, given.fixtures, given.output)
    sys.stdout.write(table(given.output) + "\n")


if __name__ == "__main__":
    main()

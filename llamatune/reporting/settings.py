"""Settings of a run in words, as course reports list them: model, data, adapter, precision, batch, rate, hardware."""

from __future__ import annotations

from pathlib import Path

from llamatune.errors import printable
from llamatune.reporting.run_reader import Run
from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.spec_sections import LoraSection, TrainingSection

_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "adamw_8bit": "8-bit AdamW"}
_KINDS = {"lora": "LoRA", "dora": "DoRA", "lora_fa": "LoRA-FA"}


def settings_of(run: Run, trainable: float | None, total: float | None) -> dict[str, str]:
    """Settings by their names, in the order to show; ``trainable`` and ``total`` are numbers of parameters."""
    spec, training = run.spec, run.spec.training
    ranks = len(run.summary.get("ranks") or ()) or 1
    settings = {
        "model": _model(run),
        "training rows": _rows(run, "train"),
        "validation rows": _rows(run, "validation"),
        "format, template": ", ".join(str(run.data[key]) for key in ("format", "template") if key in run.data),
        "longest row, tokens": _longest(run),
        "trained": "every parameter" if spec.lora is None else _adapter(spec.lora),
        "trained parameters": _parameters(trainable, total),
        "precision": f"{training.precision}, weights held in {spec.model.dtype}",
        "activation checkpointing": training.activation_checkpointing,
        "batch": _batch(training, ranks),
        "length": _length(training),
        "optimizer": _optimizer(training),
        "learning rate": _rate(run),
        "gradient clipping": "none" if training.max_grad_norm is None else f"norm {training.max_grad_norm:g}",
        "seed": str(training.seed),
        "hardware": _hardware(run, ranks),
        "software": ", ".join(f"{name} {text}" for name, text in run.versions.items() if name != "GPU"),
    }
    return {name: printable(text) for name, text in settings.items() if text}


def _model(run: Run) -> str:
    model = run.spec.model
    parts = [Path(model.path).name or model.path]
    if model.init == "random":
        parts.append("weights drawn at random")
    if model.num_layers is not None:
        parts.append(f"first {model.num_layers} layers")
    return ", ".join(parts)


def _rows(run: Run, split: str) -> str:
    rows, tokens = run.data.get(f"{split}_rows"), run.data.get(f"{split}_target_tokens")
    if not isinstance(rows, int) or not rows:
        return ""
    return f"{rows:,}" + (f" ({tokens:,} target tokens)" if isinstance(tokens, int) else "")


def _longest(run: Run) -> str:
    limit, longest = run.data.get("max_seq_length"), run.data.get("train_longest_row_tokens")
    parts = [f"{longest:,}"] if isinstance(longest, int) else []
    parts += [f"cut at {limit:,}"] if isinstance(limit, int) else []
    return ", ".join(parts) + (", packed" if run.spec.data.packing and parts else "")


def _adapter(lora: LoraSection) -> str:
    every = set(lora.target_modules) == set(LINEAR_MODULES)
    targets = "all linear layers" if every else ", ".join(lora.target_modules)
    parts = [f"{_KINDS[lora.kind]}, r {lora.r}, alpha {lora.alpha:g}", f"dropout {lora.dropout:g}", f"on {targets}"]
    parts += ["rank-stabilised"] if lora.use_rslora else []
    parts += [f"other ranks of {', '.join(lora.ranks)}"] if lora.ranks else []
    parts += [f"init {lora.init}"] if lora.init != "kaiming" else []
    parts += [f"{', '.join(lora.modules_to_save)} whole"] if lora.modules_to_save else []
    return ", ".join(parts)


def _parameters(trainable: float | None, total: float | None) -> str:
    if trainable is None or not total:
        return ""
    return f"{trainable:,.0f} of {total:,.0f} ({100 * trainable / total:.4f} %)"


def _batch(training: TrainingSection, ranks: int) -> str:
    micro, accumulated = training.micro_batch_size, training.gradient_accumulation_steps
    text = f"{micro * accumulated * ranks} = micro-batch {micro} x accumulation {accumulated}"
    return text + (f" x {ranks} ranks" if ranks > 1 else "")


def _length(training: TrainingSection) -> str:
    if training.max_steps is not None:
        return f"{training.max_steps:,} updates"
    return f"{training.num_epochs:g} epochs" if training.num_epochs is not None else ""


def _optimizer(training: TrainingSection) -> str:
    parts = [_OPTIMIZERS[training.optimizer]]
    if training.optimizer == "sgd":
        parts.append(f"momentum {training.momentum:g}")
    else:
        parts.append(f"betas {training.betas[0]:g}, {training.betas[1]:g}")
    return ", ".join([*parts, f"weight decay {training.weight_decay:g}"])


def _rate(run: Run) -> str:
    training = run.spec.training
    given = training.learning_rate
    highest = max((step.learning_rate for step in run.metrics.steps), default=0.0)
    parts = [
        f"{given:g}" if isinstance(given, float) else f"{given or 'default'} ({highest:.3g})",
        training.lr_scheduler,
    ]
    if training.warmup_ratio:
        parts.append(f"warm-up {training.warmup_ratio:g} of the updates")
    elif training.warmup_steps:
        parts.append(f"warm-up {training.warmup_steps} updates")
    return ", ".join(parts)


def _hardware(run: Run, ranks: int) -> str:
    gpu, device = run.summary.get("gpu") or {}, run.summary.get("device") or run.spec.training.device
    name = gpu.get("name") or run.versions.get("GPU") or ("" if device == "auto" else str(device).upper())
    cpu = run.summary.get("cpu")
    if cpu and not gpu:
        name = f"CPU: {cpu['name']}, {_counted(cpu['cores'], 'core')}, {_counted(cpu['threads'], 'thread')}"
    return f"{ranks} x {name}" if ranks > 1 and name else name


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"

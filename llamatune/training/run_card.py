"""The model card of what a run trained, and the chat template of the prompts that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llamatune.checkpoints.companion_files import RunCompanions
from llamatune.checkpoints.model_card import ModelCard, hub_name
from llamatune.data.template_as_jinja import source_of
from llamatune.events import OnEvent
from llamatune.formats.manifest import Manifest
from llamatune.formats.markdown import code_block
from llamatune.spec import RunSpec
from llamatune.training.inputs import Inputs
from llamatune.training.spec_changes import MAY_CHANGE

_LOCAL = ("model.path", "model.quantized_cache", "lora.init_from", "training.device")
"""Fields that mean nothing on another machine; so do those of data and tracking. Patience may be raised later."""
_SECTIONS = ("model", "lora", "training")


def run_companions(spec: RunSpec, inputs: Inputs, on_event: OnEvent) -> RunCompanions:
    """What the run's products carry of the base, with the chat template that was trained."""
    prepared, base = inputs.prepared.manifest, Path(spec.model.path)
    ends = tuple({end: None for found in inputs.prepared.manifests if (end := found.end_of_turn) is not None})
    return RunCompanions(base, inputs.config, chat_template_of(prepared), ends, on_event)


def chat_template_of(prepared: Manifest) -> str | None:
    """The chat template that makes the prompts of prepared rows; None: no conversation was trained."""
    tokenizer = prepared.facts.get("tokenizer")
    puts_bos = isinstance(tokenizer, dict) and tokenizer.get("bos_id") is not None
    return None if prepared.template is None else source_of(prepared.template, lambda: puts_bos)


def run_card(spec: RunSpec, inputs: Inputs, peft_base: str | None, results: Mapping[str, Any]) -> ModelCard:
    """``results``: facts about the weights, such as step and losses. ``peft_base`` as ``RunCompanions`` has it."""
    base, rows, lora = spec.model.path, inputs.prepared.train, spec.lora
    facts = {
        "base": hub_name(base),
        "rows": f"{len(rows):,} training rows, {sum(rows.lengths):,} tokens",
        **results,
    }
    what = "Fine-tuned model" if lora is None else "LoRA adapter"
    notes = ["What decided the training:", code_block(_deciding_fields(spec), "yaml")]
    if template := inputs.prepared.manifest.template:
        texts = [code_block(str(template[key])) for key in ("prompt", "chat_template") if template.get(key)]
        notes += [f"Rows were put into the template {template.get('name')!r}:", *texts]
    if lora is not None and spec.model.init == "pretrained":
        notes += _how_to_open(peft_base)
    tags = ["llamatune", *(() if lora is None else ("lora",))]
    library = "transformers" if lora is None else "peft"
    return ModelCard(f"{what} of {Path(hub_name(base)).name}", base, library, tags, facts, notes)


def _deciding_fields(spec: RunSpec) -> str:
    values: dict[str, dict[str, Any]] = {}
    for field, value in spec.flat().items():
        section, _, key = field.partition(".")
        if section in _SECTIONS and value is not None and field not in (*_LOCAL, *MAY_CHANGE):
            values.setdefault(section, {})[key] = value
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _how_to_open(peft_base: str | None) -> list[str]:
    if peft_base is not None:
        code = 'AutoPeftModelForCausalLM.from_pretrained("ADAPTER")'
        return ["With PEFT:", code_block(f"from peft import AutoPeftModelForCausalLM\n\nmodel = {code}", "python")]
    return [
        "The base is in Meta's format, which PEFT does not open, so `adapter_config.json` names no base. Open the same "
        "base in Hugging Face's format and put the adapter on it:",
        code_block('PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")', "python"),
        "`llamatune generate` and `llamatune merge-lora --format hf` take the Meta directory itself.",
    ]

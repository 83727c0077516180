"""What a product carries of its base beside tensors and configuration: tokenizer, settings of generation, licences."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamatune.checkpoints.adapter import Adapter
from llamatune.checkpoints.config_json import add_stop_tokens, stop_tokens, write_generation_config
from llamatune.checkpoints.model_card import CARD, ModelCard, hub_name, write_card
from llamatune.checkpoints.model_directory import Format, detect_format
from llamatune.data.template_as_jinja import source_of
from llamatune.durable_writing import link_files, remove
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.events import Notice, OnEvent
from llamatune.formats.manifest import Staging
from llamatune.safe_reading import digest_file
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.copied_files import (
    complete_tokenizer,
    copy_file,
    copy_huggingface_tokenizer,
    read_chat_template,
    replace_chat_template,
)
from llamatune.tokenizers.loading import load_tokenizer

_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy|copying)([._-].*)?", re.IGNORECASE)
_LARGEST_LICENCE = 1 << 20


def copy_licences(source: Path, directory: Path) -> None:
    """The licence, notice and use policy of a model, byte for byte; what is not readable stays behind."""
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        is_readable = file.is_file() and os.access(file, os.R_OK) and file.stat().st_size <= _LARGEST_LICENCE
        if _LICENCE.fullmatch(file.name) and is_readable:
            copy_file(file, directory)


def copy_papers(source: Path, directory: Path) -> None:
    """The card of a model and its licences, for the same model in another format."""
    copy_licences(source, directory)
    card = source / CARD
    if card.is_file() and card.stat().st_size <= _LARGEST_LICENCE:
        copy_file(card, directory)


def complete_merged(
    directory: Path,
    format_: Format,
    base: Path,
    adapters: Sequence[Adapter],
    template: Mapping[str, Any] | None,
    facts: Mapping[str, object],
) -> None:
    """Add what a merged model lacks beside weights, configuration and tokenizer: chat template, EOS, licences, card.

    Every EOS of the base and of the adapters ends a text.

    Args:
        template: the one that is stored; where no chat was trained, the base's chat template stays.
    """
    if format_ == "hf":
        if (chat_template := _chat_template(directory, adapters, template)) is not None:
            replace_chat_template(directory, chat_template)
        add_stop_tokens(directory, [token for adapter in adapters for token in stop_tokens(_place(adapter))])
    copy_licences(base, directory)
    shown: dict[str, object] = {"base": hub_name(str(base))}
    for number, adapter in enumerate(adapters, 1):
        name, spec = f"adapter {number}" if len(adapters) > 1 else "adapter", adapter.config
        shown[name] = f"{_place(adapter).name}, r {spec.r}, alpha {spec.alpha:g}, on {', '.join(spec.target_modules)}"
        shown[f"SHA-256 of {name}"] = adapter.digest
    library, tags = "transformers" if format_ == "hf" else None, ("llamatune", "merge", "lora")
    title = f"{Path(hub_name(str(base))).name} with {'LoRA adapters' if len(adapters) > 1 else 'a LoRA adapter'} merged"
    write_card(directory, ModelCard(title, str(base), library, tags, {**shown, **facts}))


def _place(adapter: Adapter) -> Path:
    assert adapter.path is not None, "it was loaded"
    return adapter.path if adapter.header is None else adapter.header.path


def _chat_template(directory: Path, adapters: Sequence[Adapter], template: Mapping[str, Any] | None) -> str | None:
    """The source that belongs to a stored template: its own, that of an adapter with it, or one that says the same."""
    for adapter in adapters:
        if adapter.template == template and (text := read_chat_template(_place(adapter))) is not None:
            return text
    with contextlib.suppress(LlamatuneError):  # a tokenizer that only transformers reads
        if template is not None:
            return source_of(template, lambda: load_tokenizer(directory).bos_id is not None)
    return None


class RunCompanions:
    """Gives the adapters and the model of one run what they carry of the base.

    An adapter's are read from the base once; a directory that replaces one shares the files of the one before. What the
    base does not hold in order is left out, with a notice, since the trained weights are worth more.

    Args:
        chat_template: the one that was trained; None: the base's.
        trained_ends: the tokens beside the tokenizer's EOS that end a trained text.
    """

    def __init__(
        self,
        base: Path,
        config: LlamaConfig,
        chat_template: str | None,
        trained_ends: Sequence[int],
        on_event: OnEvent,
    ) -> None:
        self._base, self._config, self._chat_template, self._on_event = base, config, chat_template, on_event
        self._trained_ends = trained_ends
        self.peft_base = None if detect_format(base) == "meta" else str(base)
        """The base as PEFT's configuration names it; None where PEFT could not open it."""
        self._written: dict[Path, dict[str, str]] = {}

    def write(self, staging: Staging, final: Path) -> None:
        """Write them into ``staging``, which will stand at ``final``."""
        before = self._written.get(final)
        if before is None or not link_files(before, final, staging.path):
            before = self._written[final] = self._copy(staging.path)
        staging.digests |= before

    def complete_model(self, directory: Path) -> None:
        """Add to a whole model, which has tokenizer and settings already."""
        try:
            if self._chat_template is not None:
                replace_chat_template(directory, self._chat_template)
            add_stop_tokens(directory, self._trained_ends)
            copy_licences(self._base, directory)
        except CheckpointError as fault:
            self._tell(fault)

    def _tell(self, fault: CheckpointError) -> None:
        self._on_event(Notice(f"written without what the base should give: {fault}", "warning"))

    def _copy(self, directory: Path) -> dict[str, str]:
        """Their digests by name."""
        own = set(directory.rglob("*"))
        try:
            copy_huggingface_tokenizer(self._base, directory, self._on_event)
            if self._chat_template is not None:
                replace_chat_template(directory, self._chat_template)
            complete_tokenizer(directory, self._base)
            write_generation_config(directory, self._config, self._base)
            add_stop_tokens(directory, self._trained_ends)
            copy_licences(self._base, directory)
        except CheckpointError as fault:
            for path in set(directory.iterdir()) - own:
                remove(path)
            self._tell(fault)
        found = sorted(path for path in directory.rglob("*") if path not in own and path.is_file())
        return {path.relative_to(directory).as_posix(): digest_file(path) for path in found}

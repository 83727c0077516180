"""What a product carries of its base beside tensors and configuration: tokenizer, settings of generation, licences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llamatune.checkpoints.adapter import Adapter
from llamatune.checkpoints.config_json import write_generation_config
from llamatune.checkpoints.model_card import ModelCard, hub_name, write_card
from llamatune.checkpoints.model_directory import Format
from llamatune.durable_writing import link_files, remove
from llamatune.errors import CheckpointError
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

_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy|copying)([._-].*)?", re.IGNORECASE)
_LARGEST_LICENCE = 1 << 20


def copy_licences(source: Path, directory: Path) -> None:
    """The licence, notice and use policy of a model, byte for byte; what is not readable stays behind."""
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if _LICENCE.fullmatch(file.name) and file.is_file() and file.stat().st_size <= _LARGEST_LICENCE:
            copy_file(file, directory)


def complete_merged(
    directory: Path, format_: Format, base: Path, adapter: Adapter, adapter_directory: Path, facts: Mapping[str, object]
) -> None:
    """Add what a merged model lacks beside weights, configuration and tokenizer: chat template, licences, card.

    The chat template is the adapter's, where its directory has one: the base's is what was used before the tuning.
    """
    template = read_chat_template(adapter_directory) if format_ == "hf" else None
    if template is not None:
        replace_chat_template(directory, template)
    copy_licences(base, directory)
    spec = adapter.config
    shown: dict[str, object] = {
        "base": hub_name(str(base)),
        "adapter": adapter_directory.name,
        "adapter's SHA-256": adapter.digest,
    }
    shown |= {"r": spec.r, "alpha": f"{spec.alpha:g}", "target modules": ", ".join(spec.target_modules)}
    library, tags = "transformers" if format_ == "hf" else None, ("llamatune", "merge", "lora")
    title = f"{Path(hub_name(str(base))).name} with a LoRA adapter merged"
    write_card(directory, ModelCard(title, str(base), library, tags, {**shown, **facts}))


class AdapterCompanions:
    """Gives the adapter directories of one run what they carry of the base.

    They are read from the base once; a directory that replaces one shares the files of the one before. What the base
    does not hold in order is left out, with a notice, since the adapter is worth more.
    """

    def __init__(self, base: Path, config: LlamaConfig, chat_template: str | None, on_event: OnEvent) -> None:
        self._base, self._config, self._chat_template, self._on_event = base, config, chat_template, on_event
        self._written: dict[Path, dict[str, str]] = {}

    def write(self, staging: Staging, final: Path) -> None:
        """Write them into ``staging``, which will stand at ``final``."""
        before = self._written.get(final)
        if before is None or not link_files(before, final, staging.path):
            before = self._written[final] = self._copy(staging.path)
        staging.digests |= before

    def _copy(self, directory: Path) -> dict[str, str]:
        """Their digests by name."""
        own = set(directory.rglob("*"))
        try:
            copy_huggingface_tokenizer(self._base, directory, self._on_event)
            if self._chat_template is not None:
                replace_chat_template(directory, self._chat_template)
            complete_tokenizer(directory, self._base)
            write_generation_config(directory, self._config, self._base)
            copy_licences(self._base, directory)
        except CheckpointError as fault:
            for path in set(directory.iterdir()) - own:
                remove(path)
            self._on_event(Notice(f"written without tokenizer and licence: {fault}", "warning"))
        found = sorted(path for path in directory.rglob("*") if path not in own and path.is_file())
        return {path.relative_to(directory).as_posix(): digest_file(path) for path in found}

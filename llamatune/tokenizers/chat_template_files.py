"""The chat templates of a model directory, which has several homes for them: read as transformers does.

transformers 5 keeps the usual one in ``chat_template.jinja`` and others in ``additional_chat_templates``; transformers
4 and Ollama read ``chat_template`` in ``tokenizer_config.json``, one text or a list of named ones. None is rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import read_bytes

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT = "default"
_MORE = "additional_chat_templates"


def read_chat_templates(directory: Path, config: Mapping[str, Any], on_event: OnEvent = ignore_event) -> dict[str, str]:
    """Templates by name, the usual one as ``default``; ``config`` is what ``tokenizer_config.json`` says.

    Files go before it; a notice says where the two differ.
    """
    stated, filed = dict(_stated(config.get("chat_template"))), dict(_filed(directory))
    if stated and filed and stated != filed:
        what = f"the chat template of its files is not that of tokenizer_config.json; {TEMPLATE_FILE} is used"
        on_event(Notice(f"{directory}: {what}, as transformers does", "warning"))
    return filed or stated


def template_entry(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """The templates as ``tokenizer_config.json`` has them: one text, or several with their names."""
    if templates.keys() == {DEFAULT}:
        return templates[DEFAULT]
    return [{"name": name, "template": text} for name, text in templates.items()]


def _stated(entry: Any) -> Iterator[tuple[str, str]]:
    """Without what no reader could use."""
    for named in entry if isinstance(entry, list) else [{"name": DEFAULT, "template": entry}]:
        name, text = (named.get("name"), named.get("template")) if isinstance(named, dict) else (None, None)
        if isinstance(name, str) and isinstance(text, str):
            yield name, text


def _filed(directory: Path) -> Iterator[tuple[str, str]]:
    file, more = directory / TEMPLATE_FILE, directory / _MORE
    if file.exists():
        yield DEFAULT, _text(file)
    if more.is_dir():
        yield from ((path.stem, _text(path)) for path in sorted(more.glob("*.jinja")))


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", file, "fetch it again") from None

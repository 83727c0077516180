"""The chat templates of a model directory: where transformers keeps them, read and written. None is run here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import read_bytes
from llamatune.strict_json import read_json
from llamatune.tokenizers.added_tokens import CONFIG, LARGEST_JSON_BYTES

TEMPLATE_FILE, OLD_TEMPLATE_FILE, TEMPLATE_FOLDER = (
    "chat_template.jinja", "chat_template.json", "additional_chat_templates")  # fmt: skip
TEMPLATE_KEY = "chat_template"
"""In ``tokenizer_config.json``: one text, or a list of names and texts."""
DEFAULT = "default"
_LARGEST_BYTES = 1 << 20
_NAME = re.compile(r"[\w.-]{1,100}")


class StoredTemplate(NamedTuple):
    """The source of a template, and the file that it is read from."""

    text: str
    file: Path


def read_chat_templates(directory: Path, on_event: OnEvent = ignore_event) -> dict[str, StoredTemplate]:
    """The templates by name, ``default`` first; a file of its own wins over ``tokenizer_config.json``.

    Raises:
        CheckpointError: a file that cannot be read as text, or that holds something else.
    """
    found: dict[str, StoredTemplate] = {}
    for file in (directory / CONFIG, directory / OLD_TEMPLATE_FILE):
        if file.exists():
            stated = read_json(file, max_bytes=LARGEST_JSON_BYTES).get(TEMPLATE_KEY)
            found |= {name: StoredTemplate(text, file) for name, text in _named(stated, file).items()}
    for file in [directory / TEMPLATE_FILE, *sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))]:
        if not file.exists():
            continue
        name, text = DEFAULT if file.parent == directory else file.stem, read_template_source(file)
        if name in found and found[name].text != text:
            what = f"differs from the chat_template in {found[name].file.name}; this file is used"
            on_event(Notice(f"{file}: {what}", "warning"))
        found[name] = StoredTemplate(text, file)
    return {name: found[name] for name in sorted(found, key=lambda name: (name != DEFAULT, name))}


def read_template_source(file: Path, error: type[LlamatuneError] = CheckpointError) -> str:
    """The text of a ``.jinja`` file."""
    try:
        return read_bytes(file, error, _LARGEST_BYTES).decode()
    except UnicodeDecodeError as fault:
        raise error(f"not UTF-8 at byte {fault.start}", file) from None


def write_chat_templates(templates: dict[str, str], directory: Path) -> dict[str, Any]:
    """Write a single one as a file of its own too; what ``tokenizer_config.json`` says of them is returned.

    With a file of its own transformers forgets all others.
    """
    if not templates:
        return {}
    if [*templates] == [DEFAULT]:
        write_template_file(directory, templates[DEFAULT])
        return {TEMPLATE_KEY: templates[DEFAULT]}
    return {TEMPLATE_KEY: [{"name": name, "template": text} for name, text in templates.items()]}


def write_template_file(directory: Path, template: str) -> None:
    """The file of the usual template."""
    with writing(directory / TEMPLATE_FILE) as file:
        file.write(template.encode(errors="replace"))


def _named(stated: Any, file: Path) -> dict[str, str]:
    if stated is None or isinstance(stated, str):
        return {} if stated is None else {DEFAULT: stated}
    found = {}
    for entry in stated if isinstance(stated, list) else [None]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not _NAME.fullmatch(name):
            what = "chat_template is neither a text nor a list of names and templates"
            raise CheckpointError(what, file, "fetch it again")
        found[name] = text
    return found

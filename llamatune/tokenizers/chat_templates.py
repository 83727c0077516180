"""The chat templates of a model directory: where transformers keeps them, read and written. None is run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.safe_reading import read_bytes
from llamatune.strict_json import read_json
from llamatune.tokenizers.added_tokens import CONFIG, LARGEST_JSON_BYTES

TEMPLATE_FILE, _FOLDER, _OLD_FILE = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
DEFAULT = "default"


def read_chat_templates(directory: Path) -> dict[str, str]:
    """The templates by name, ``default`` first; files of their own win over ``tokenizer_config.json``.

    Raises:
        CheckpointError: a file that cannot be read as text, or that holds something else.
    """
    found: dict[str, str] = {}
    for name in (CONFIG, _OLD_FILE):
        file = directory / name
        stated = read_json(file, max_bytes=LARGEST_JSON_BYTES).get("chat_template") if file.exists() else None
        found |= _named(stated, file)
    files = {DEFAULT: directory / TEMPLATE_FILE}
    folder = directory / _FOLDER
    files |= {file.stem: file for file in sorted(folder.glob("*.jinja"))} if folder.is_dir() else {}
    for name, file in files.items():
        if file.exists():
            try:
                found[name] = read_bytes(file).decode()
            except UnicodeDecodeError:
                raise CheckpointError("not UTF-8", file, "fetch it again") from None
    return {name: found[name] for name in sorted(found, key=lambda name: (name != DEFAULT, name))}


def write_chat_templates(templates: dict[str, str], directory: Path) -> dict[str, Any]:
    """Write a single one as a file of its own too; what ``tokenizer_config.json`` says of them is returned.

    With a file of its own transformers forgets all others.
    """
    if [*templates] == [DEFAULT]:
        with writing(directory / TEMPLATE_FILE) as file:
            file.write(templates[DEFAULT].encode())
    if not templates:
        return {}
    if [*templates] == [DEFAULT]:
        return {"chat_template": templates[DEFAULT]}
    return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}


def _named(stated: Any, file: Path) -> dict[str, str]:
    if stated is None:
        return {}
    try:
        named = {DEFAULT: stated} if isinstance(stated, str) else {t["name"]: t["template"] for t in stated}
    except (LookupError, TypeError):
        named = {"": None}
    if not all(isinstance(part, str) for item in named.items() for part in item):
        raise CheckpointError("malformed: its chat_template cannot be read", file, "fetch it again")
    return named

"""``explain``: what is known of an exit code, of an error's text, or of a key of the run spec."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamatune.errors import SpecError
from llamatune.explaining.all_topics import topics_of
from llamatune.explaining.exit_codes import EXIT_CODES, exit_code
from llamatune.explaining.key_examples import KEY_EXAMPLES
from llamatune.explaining.topics import Topic
from llamatune.spec_schema import SpecKey, section_names, spec_keys

_MOST = 3


@dataclass(frozen=True)
class Explanation:
    """``kind``: ``codes`` (all of them), ``code``, ``error``, ``section`` or ``key``; ``entries`` are of that kind."""

    kind: str
    subject: str
    entries: tuple[dict[str, Any], ...]


def explain(words: Sequence[str]) -> Explanation:
    """What is known of the subject; without one, every exit code.

    Raises:
        SpecError: nothing is known of it.
    """
    subject = " ".join(words).strip()
    if not subject:
        return Explanation("codes", "", tuple(map(_code_facts, (entry.code for entry in EXIT_CODES))))
    number = subject.removeprefix("exit code ").removeprefix("code ")
    if number.isascii() and number.isdigit():
        if exit_code(int(number[:9])) is None:
            codes = ", ".join(str(entry.code) for entry in EXIT_CODES)
            shown = number if len(number) < 10 else f"{number[:9]}..."
            raise SpecError(f"no verb ends with exit code {shown}", None, f"there are {codes}")
        return Explanation("code", number, (_code_facts(int(number)),))
    if keys := _keys(subject):
        kind = "key" if len(keys) == 1 else "section" if subject in section_names() else "keys"
        return Explanation(kind, subject, tuple(map(_key_facts, keys)))
    if topics := topics_of(subject)[:_MOST]:
        return Explanation("error", subject, tuple(map(_topic_facts, topics)))
    near = difflib.get_close_matches(subject, [key.name for key in spec_keys()], 1)
    meant = f"did you mean {near[0]}?" if near else "give an exit code, the text of an error, or a key of the spec"
    raise SpecError(f"nothing is known of {subject[:80]!r}", None, meant)


def _keys(subject: str) -> list[SpecKey]:
    """The keys of that name, with its section or without; of an override, its key; of a section, all of its keys."""
    name, known = subject.partition("=")[0].strip().rstrip(":"), list(spec_keys())
    if any(character.isspace() for character in name):
        return []
    exact = [key for key in known if key.name == name]
    return exact or [key for key in known if name in key.name.split(".")]


def _code_facts(number: int) -> dict[str, Any]:
    entry = exit_code(number)
    assert entry is not None
    facts = asdict(entry)
    del facts["kinds"]
    return facts


def _topic_facts(topic: Topic) -> dict[str, Any]:
    entry = exit_code(topic.code)
    assert entry is not None
    facts = asdict(topic)
    del facts["pattern"]
    return facts | {"code_name": entry.name}


def _key_facts(key: SpecKey) -> dict[str, Any]:
    listed = next((value for value in key.values if value != "null"), key.default)
    value = KEY_EXAMPLES.get(key.name, listed)
    section, _, name = key.name.partition(".")
    return {
        "key": key.name,
        "meaning": key.description,
        "kind": key.kind,
        "required": key.required,
        "default": key.default,
        "example": f"{section}: {{{name}: {value if isinstance(value, str) else json.dumps(value)}}}",
        "override": f"{key.name}={value if isinstance(value, str) else json.dumps(value)}",
    }

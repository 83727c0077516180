"""Shell completion: the values of options, overrides and keys of the run spec. Neither torch nor the spec is loaded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from llamatune.command_options.option import Option

VARIABLE = "_LLAMATUNE_COMPLETE"
"""What a shell sets to ask for completions, as ``complete_bash``."""
Candidates = Iterable[str | tuple[str, str]]
"""Words, some with what they mean."""


def completer(option: Option) -> Callable[[str], list[str | tuple[str, str]]] | None:
    """What completes the values of an option; None: the shell's own names of files."""
    offered = COMPLETED.get(option.name)
    if option.choices:
        return _matching(lambda begun: option.choices)
    return None if offered is None or option.kind is int else _matching(offered)


def _matching(offered: Callable[[str], Candidates]) -> Callable[[str], list[str | tuple[str, str]]]:
    def complete(incomplete: str) -> list[str | tuple[str, str]]:
        words = offered(incomplete)
        return [word for word in words if (word if isinstance(word, str) else word[0]).startswith(incomplete)]

    return complete


def _overrides(begun: str) -> Candidates:
    """``section.key=``; of one key alone, and behind ``=``, its values."""
    if not begun:  # names of files too
        return []
    from llamatune.spec_schema import section_names, spec_keys

    keys = [key for key in spec_keys() if f"{key.name}=".startswith(begun.partition("=")[0] + "=" * ("=" in begun))]
    if len(keys) == 1:
        (key,) = keys
        shown = "null" if key.default is None else _as_yaml(key.default)
        values = list(dict.fromkeys([*key.values, *([] if key.required else [shown])]))
        return [f"{key.name}={value}" for value in values] or [f"{key.name}="]
    nulls = [f"{name}=null" for name in section_names() if name == "lora"]
    return [*((f"{key.name}=", key.description) for key in keys), *nulls]


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _keys(begun: str) -> Candidates:
    from llamatune.spec_schema import spec_keys

    return [(key.name, key.description) for key in spec_keys()]


def _subjects(begun: str) -> Candidates:
    from llamatune.explaining.exit_codes import EXIT_CODES

    return [*((str(code.code), code.name) for code in EXIT_CODES), *_keys(begun)]


def _presets(begun: str) -> Candidates:
    from llamatune.shapes.presets import PRESETS

    return PRESETS


def _gpus(begun: str) -> Candidates:
    from llamatune.shapes.known_gpus import KNOWN_GPUS

    return KNOWN_GPUS


def _formats(begun: str) -> Candidates:
    return ("auto", "alpaca", "gsm8k", "chat", "completion", "text")


def _templates(begun: str) -> Candidates:
    return ("alpaca", "gsm8k", "completion", "text", "llama2-chat", "llama3-chat", "chatml", "model", "none")


def _devices(begun: str) -> Candidates:
    return ("auto", "cpu", "cuda", "cuda:0")


COMPLETED: Mapping[str, Callable[[str], Candidates]] = {
    "allow_spec_change": _keys,
    "arguments": _overrides,
    "device": _devices,
    "format": _formats,
    "gpu": _gpus,
    "grid": _overrides,
    "overrides": _overrides,
    "preset": _presets,
    "preset_grid": lambda begun: ("techniques", "checkpointing"),
    "subject": _subjects,
    "target_modules": lambda begun: ("all-linear", "q_proj,v_proj"),
    "task": lambda begun: ("gsm8k",),
    "template": _templates,
}
"""By the name of an option or argument: what is offered for the word that was begun. Choices need no entry."""


def join_words_of_bash(environment: MutableMapping[str, str]) -> str:
    """Undo that bash ends a word at ``=``; the part of the last word that bash will keep before a completion.

    It changes ``COMP_WORDS`` and ``COMP_CWORD``.
    """
    if environment.get(VARIABLE) != "complete_bash":
        return ""
    try:
        words = shlex.split(environment.get("COMP_WORDS", ""))
    except ValueError:  # an open quote
        return ""
    place = int(environment.get("COMP_CWORD", "0"))
    words += [""] * (place + 1 - len(words))
    joined, kept = list(_joined(words[: place + 1])), ""
    if len(joined) <= place:
        kept = joined[-1].rpartition("=")[0] + "=" if "=" in words[place - 1 : place + 1] else ""
        environment["COMP_WORDS"], environment["COMP_CWORD"] = shlex.join(joined), str(len(joined) - 1)
    return kept


def _joined(words: Iterable[str]) -> Iterator[str]:
    held = ""
    for word in words:
        if word == "=" or held.endswith("="):
            held += word
        else:
            if held:
                yield held
            held = word
    yield held


def asked_verb() -> str:
    """The verb of the line that is completed, if it is written out and something follows; it alone is loaded then."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    words = line.split()
    following = len(words) > 2 or line.endswith(" ") or os.environ.get("COMP_CWORD", "0") not in ("0", "1")
    return words[1] if len(words) > 1 and following else ""

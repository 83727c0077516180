"""Options of ``chat``, and those of them that the conversation may change."""

from dataclasses import dataclass, replace
from typing import Any

from llamatune.command_options.inference import Drawing, ModelSource, Sampling
from llamatune.command_options.option import option, option_fields
from llamatune.errors import SpecError

_CHANGEABLE = {declared.name: declared for declared in option_fields(Drawing)}


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Drawing, ModelSource):
    """A model to talk to, the template of its turns, and how answers are drawn."""

    template: str | None = option(
        "A template's name or file.", None, shown_default="the one stored with the adapter, else the model's own"
    )
    system: str | None = option("The system message.", None, metavar="TEXT", shown_default="none")

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in _CHANGEABLE})


def shown_parameters(sampling: Sampling) -> str:
    """``temperature=0.6 top_k=none ...``, as ``with_parameters`` reads it."""
    values = {name: getattr(sampling, name) for name in _CHANGEABLE}
    return " ".join(f"{name}={'none' if value is None else value}" for name, value in values.items())


def with_parameters(sampling: Sampling, text: str) -> Sampling:
    """``sampling`` with what ``text`` says, such as ``temperature=0.2 max_new_tokens=64``; ``SpecError`` otherwise."""
    changed = dict[str, Any]()
    for word in text.split():
        name, equals, value = word.partition("=")
        declared = _CHANGEABLE.get(name)
        if declared is None or not equals:
            todo = f"write NAME=VALUE; the names are {', '.join(_CHANGEABLE)}"
            raise SpecError(f"no parameter is set by {word[:80]!r}", "/params", todo)
        try:
            is_none = value == "none" and declared.default is None
            changed[name] = None if is_none else declared.kind(value)
        except ValueError:
            kind = "a whole number" if declared.kind is int else "a number"
            raise SpecError(f"{name} is {value[:80]!r}", "/params", f"it must be {kind}") from None
    return replace(sampling, **changed)

"""The command of a verb, as a user would type it, from its options."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamatune.command_options.option import Option, Options, option_fields


def command_line(verb: str, options: Options) -> str:
    """``llamatune VERB ...`` for a shell. What has its default is left out; arguments come first.

    Options whose values are made from text in another form (``parse``) must have their defaults.
    """
    declared = [(option, getattr(options, option.name)) for option in option_fields(type(options))]
    given = [(option, value) for option, value in declared if option.required or value != option.default]
    words = ["llamatune", verb]
    for option, value in sorted(given, key=lambda pair: not pair[0].argument):
        assert option.parse is None, f"{option.flag}: its text is not known"
        words += _words(option, value)
    return shlex.join(words)


def _words(option: Option, value: Any) -> Iterable[str]:
    if value is True:
        return [option.flag]
    values = [value] if isinstance(value, (str, Path)) or not isinstance(value, Iterable) else value
    texts = [str(value) for value in values]
    return texts if option.argument else [word for text in texts for word in (option.flag, text)]

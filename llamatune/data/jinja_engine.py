"""The engine of Jinja chat templates: a sandbox like that of transformers, and the turns of a rendered conversation.

``serve`` is the main function of the process in which templates from elsewhere are compiled and rendered; no other
module of llamatune is imported there.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import jinja2.debug  # Jinja imports it at the first fault, when no file can be opened any more
import jinja2.ext
import jinja2.sandbox

SECONDS = 2
"""Processor time of one rendering; Llama 3.1's template takes less than a millisecond."""
LARGEST_OUTPUT = 8 << 20
_LARGEST_MEMORY = 512 << 20
_LONGEST_FAULT = 300

_WARMING = r"""{{ 'é\n' | tojson(indent=1) }}{{ strftime_now('%d') }}{{ 'x' | wordwrap }}{{ 1 / 0 }}"""

Message = dict[str, str]


class Refused(Exception):
    """The template itself says that it has no form for the conversation."""


class Broken(Exception):
    """The template cannot be compiled or rendered."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` around what the model says."""

    tags = {"generation"}  # noqa: RUF012
    identifier = "generation"

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.noted: list[str] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        self.noted.append(caller())
        return self.noted[-1]


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` of a template, without names that begin with ``_``."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, *values = arguments
        named = dict(*values, **attributes)
        for name in named:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, named)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class _Dict:
    """``dict`` of a template: a call or ``dict.fromkeys``, and no other part of the type."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} on a namespace")


class Engine:
    """A compiled template.

    Args:
        source: the template's text.
        variables: texts that it may name, such as ``bos_token``.
        now: what ``strftime_now`` takes for the present, in ISO 8601.

    Raises:
        Broken: it cannot be compiled.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: str | None = None) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        moment = datetime.datetime.fromisoformat(now or "2000-01-01")
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: moment.strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._variables, self._draws = dict(variables), "random" in source
        self._generation: Any = environment.extensions[_Generation.identifier]
        with _faults():
            self._template = environment.from_string(source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            Refused: the template raised an exception of its own.
            Broken: it cannot be rendered, or its text is too long.
        """
        return self._render(messages, add_generation_prompt)[0]

    def _render(self, messages: Sequence[Message], prompted: bool) -> tuple[str, list[list[int]]]:
        """The text, and where the generation blocks are in it, if none is within a macro or another block."""
        noted = self._generation.noted = list[str]()
        if self._draws:
            random.seed(0)
        given = {**self._variables, "messages": [dict(message) for message in messages], "tools": None,
                 "documents": None, "add_generation_prompt": prompted}  # fmt: skip
        parts, blocks, length, found = list[str](), list[list[int]](), 0, True
        with _faults():
            for part in self._template.root_render_func(self._template.new_context(given)):
                if noted:
                    found = found and noted == [part]
                    blocks.append([length, length + len(part)])
                    noted.clear()
                parts.append(part)
                length += len(part)
                if length > LARGEST_OUTPUT:
                    raise Broken(f"its text has more than {LARGEST_OUTPUT:,} characters")
        return "".join(parts), blocks if found else []

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """``text`` of the ``messages`` of a request, as a prompt if ``prompt`` is true.

        With ``turns``, indices of messages: ``blocks``, the generation blocks; and for each turn the length of the text
        that precedes it with a generation prompt (``before``) and of the text that ends with it (``through``); -1 if
        that text is none that the whole text begins with, or the turn is not ``wanted``.
        """
        messages: list[Message] = request["messages"]
        text, blocks = self._render(messages, bool(request.get("prompt")))
        reply: dict[str, Any] = {"text": text}
        if "turns" in request:
            turns, wanted = request["turns"], request["wanted"]
            reply["blocks"] = blocks
            reply["before"] = [self._beginning(text, messages[:turn], True) for turn in turns]
            reply["through"] = [
                -1 if not is_wanted
                else len(text) if turn + 1 == len(messages)
                else self._beginning(text, messages[: turn + 1], False)
                for turn, is_wanted in itertools.zip_longest(turns, wanted)
            ]  # fmt: skip
        return reply

    def _beginning(self, whole: str, messages: Sequence[Message], prompted: bool) -> int:
        try:
            text = self.render(messages, prompted)
        except (Refused, Broken):  # a template may look for messages that are only in the whole
            return -1
        return len(text) if whole.startswith(text) else -1


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Turn what a template raises into ``Refused`` or ``Broken``."""
    try:
        yield
    except (Refused, Broken):
        raise
    except MemoryError:
        raise Broken(f"it needs more than {_LARGEST_MEMORY >> 20} MiB of memory") from None
    except RecursionError:
        raise Broken("it is nested too deeply") from None
    except jinja2.TemplateSyntaxError as fault:
        raise Broken(f"line {fault.lineno}: {_line(fault.message)}") from None
    except Exception as fault:
        raise Broken(f"{type(fault).__name__}: {_line(fault)}") from None


def _line(fault: object) -> str:
    return re.sub(r"\s+", " ", str(fault))[:_LONGEST_FAULT]


def _raise(message: object = "") -> None:
    raise Refused(_line(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter ``tojson``, which unlike Jinja's own escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TimedEngine(Engine):
    """An engine whose process is ended by the system when a rendering takes too much processor time."""

    def __init__(self, *arguments: Any) -> None:
        with _timer():
            super().__init__(*arguments)

    def _render(self, messages: Sequence[Message], prompted: bool) -> tuple[str, list[list[int]]]:
        with _timer():
            return super()._render(messages, prompted)


@contextlib.contextmanager
def _timer() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(descriptor: int) -> None:
    """Answer requests, JSON in and JSON out, until the pipe closes; the first one holds ``Engine``'s arguments.

    SIGPROF has its default action, which ends the process, also within a library's call.
    """
    lowest = os.dup(descriptor)
    os.close(descriptor)
    connection = Connection(lowest)
    with contextlib.suppress(Broken):  # everything that Python and Jinja import late, while files can be opened
        Engine(_WARMING, {}).render([])
    limits = {
        resource.RLIMIT_AS: _LARGEST_MEMORY, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: lowest + 1,
    }  # fmt: skip
    for limit, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a system that does not have it
            resource.setrlimit(limit, (most, most))
    engine: Engine | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request = json.loads(connection.recv_bytes())
            try:
                if engine is None:
                    engine, reply = _TimedEngine(*request), dict[str, Any]()
                else:
                    reply = engine.reply(request)
            except Refused as fault:
                reply = {"refused": str(fault)}
            except Broken as fault:
                reply = {"broken": str(fault)}
            connection.send_bytes(json.dumps(reply).encode())

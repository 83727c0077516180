"""``llamatune explain``: what an exit code, an error or a key of the run spec means, with an example."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from llamatune.command_options.spec_help import ExplainOptions
from llamatune.commands._console import Console, RichConsole


def explain(options: ExplainOptions, console: Console) -> None:
    """Explain an exit code, an error or a key of the spec."""
    from dataclasses import asdict

    from llamatune.explaining.explain import explain as explain_subject

    with console:
        found = explain_subject(options.subject)
        console.result(asdict(found), lambda out: _print(out, found.kind, found.entries))


def _print(out: RichConsole, kind: str, entries: tuple[dict[str, Any], ...]) -> None:
    show = {"codes": _code, "code": _code, "error": _topic}.get(kind, _key if len(entries) == 1 else _short_key)
    for number, entry in enumerate(entries):
        if number and show is not _short_key:
            out.print()
        for line in show(entry):
            out.print(line, soft_wrap=line.startswith("  "))


def _code(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"exit code {entry['code']}: {entry['name']}"
    yield from _body(entry)


def _topic(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"{entry['name']} (exit code {entry['code']}: {entry['code_name']})"
    yield from _body(entry)


def _body(entry: Mapping[str, Any]) -> Iterator[str]:
    yield entry["meaning"]
    yield f"  for example: {entry['example']}"
    yield f"What to do: {entry['todo']}"


def _key(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"{entry['key']}: {entry['meaning'] or 'see docs/run-spec.md'}"
    yield f"values: {entry['kind']}; " + (
        "required" if entry["required"] else f"default: {json.dumps(entry['default'])}"
    )
    yield f"  in a spec:           {entry['example']}"
    yield f"  on the command line: {shlex.quote(entry['override'])}"


def _short_key(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {entry['key']}: {entry['meaning'] or entry['kind']}"

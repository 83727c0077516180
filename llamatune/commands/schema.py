"""``llamatune schema``: the JSON schema of run specs, for editors and validators."""

from __future__ import annotations

from llamatune.command_options.spec_help import SchemaOptions
from llamatune.commands._console import Console


def schema(options: SchemaOptions, console: Console) -> None:
    """Print the JSON schema of the run spec."""
    from llamatune.output_files import write_output
    from llamatune.spec_schema import EDITOR_LINE, read_schema, schema_text

    with console:
        schema = read_schema()
        if options.output is None:
            console.result(schema, lambda out: out.out(schema_text(schema), end="", highlight=False))
            return
        write_output(options.output, schema_text(schema).encode(), options.overwrite)
        line = EDITOR_LINE.format(options.output.name)
        payload = {"output": str(options.output), "editor_line": line}
        console.result(payload, lambda out: out.out(f"written: put {line!r} first in specs beside it", highlight=False))

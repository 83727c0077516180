"""Options of the verbs that help to write a spec, to read an error and to look things up: schema, explain, docs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.command_options.option import Options, option


@dataclass(frozen=True)
class SchemaOptions(Options):
    """Where the schema goes."""

    output: Path | None = option("The file to write.", None, shown_default="stdout", writes="file")
    overwrite: bool = option("Replace what stands at --output.", False)


@dataclass(frozen=True)
class ExplainOptions(Options):
    """What is to be explained; nothing: the exit codes."""

    subject: Sequence[str] = option(
        "An exit code, an error or words of it, or a key of the spec such as training.learning_rate.",
        (),
        argument=True,
        metavar="CODE|ERROR|KEY ...",
    )


@dataclass(frozen=True)
class DocsOptions(Options):
    """What is to be read; nothing: the list of pages."""

    page: str | None = option("The name of a page.", None, argument=True, metavar="PAGE")

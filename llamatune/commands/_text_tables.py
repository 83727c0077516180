"""Text tables and their notes on stdout, as rich draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamatune.commands._console import RichConsole
from llamatune.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamatune.formats.text_table import TextTable


def print_table(out: RichConsole, table: TextTable, dense: bool = False) -> None:
    """Columns of labels to the left, of numbers to the right; ``dense``: narrow ones, for tables of many."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0 if dense else (0, 1))
    for place, heading in enumerate(table.header):
        drawn.add_column(heading, justify="left" if place < table.labels else "right")
    for row in table.rows:
        drawn.add_row(*(text.replace(" (", "\n(") if dense else text for text in row))
    out.print(drawn)


def print_notes(out: RichConsole, notes: Sequence[str]) -> None:
    """A line each."""
    for note in notes:
        out.print(printable(f"- {note}"), soft_wrap=True)

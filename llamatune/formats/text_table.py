"""A table of texts with a title and notes, as Markdown and as LaTeX."""

from __future__ import annotations

from dataclasses import dataclass

from llamatune.formats import latex, markdown


@dataclass(frozen=True)
class TextTable:
    """Cells of text; the first ``labels`` columns name the line, the others are numbers.

    Args:
        notes: printed below.
        wide: cells hold texts of several lines.
        name: of the files that it is written to, without the ending; empty: it is written to none of its own.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    notes: tuple[str, ...] = ()
    wide: bool = False
    name: str = ""

    def markdown(self) -> str:
        """A page with the title as its heading."""
        labels = len(self.header) if self.wide else self.labels
        notes = "".join(f"\n- {markdown.one_line(note)}" for note in self.notes)
        table = markdown.table(self.header, self.rows, labels)
        return f"## {markdown.one_line(self.title)}\n\n{table}\n{notes}" + "\n" * bool(notes)

    def latex(self) -> str:
        """A file to be ``\\input``; its notes stand below the table."""
        return latex.table(self.title, self.header, self.rows, self.labels, self.wide, self.notes)

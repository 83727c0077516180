"""``llamatune docs``: the pages of the documentation, or the text of one."""

from __future__ import annotations

from llamatune.command_options.spec_help import DocsOptions
from llamatune.commands._console import Console


def docs(options: DocsOptions, console: Console) -> None:
    """List the pages of the documentation, or print one."""
    from llamatune.documentation import find_page, index, pages, title

    with console:
        if options.page is None:
            titles = {name: title(path) for name, path in pages().items()}
            width = max(map(len, titles))
            sections = [
                f"{heading}\n" + "".join(f"  {name:{width}}  {content}\n" for name, content in section.items())
                for heading, section in index().items()
            ]
            listed = "\n".join(sections)
            console.result({"pages": titles}, lambda out: out.out(listed, end="", highlight=False))
            return
        path = find_page(options.page)
        text = path.read_text(encoding="utf-8")
        payload = {"page": path.stem, "title": title(path), "path": str(path), "text": text}
        console.result(payload, lambda out: out.out(text, end="", highlight=False))

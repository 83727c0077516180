"""Puts measured tables into docs/benchmark.md: ``python docs/make_benchmark.py tiny=DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).with_name("benchmark.md")


def main(arguments: list[str]) -> None:
    """Replace the text between ``<!-- NAME -->`` and ``<!-- end -->`` by the tables of a benchmark's directory."""
    page = PAGE.read_text(encoding="utf-8")
    for argument in arguments:
        name, _, directory = argument.partition("=")
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        tables = (Path(directory) / "benchmark.md").read_text(encoding="utf-8").removeprefix("# Benchmark\n")
        before, _, rest = page.partition(begin)
        page = before + begin + tables.replace("\n## ", "\n### ") + end + rest.partition(end)[2]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

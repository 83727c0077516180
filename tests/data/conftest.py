"""Short ways to write rows and prepare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from merging_tokenizer import train_merging_tokenizer

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or lines as they are) as JSON Lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes("".join(line + "\n" for line in lines).encode())
        return path

    return write


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_models: dict[str, Path]) -> Callable[..., SimpleNamespace]:
    """Prepare one file into ``tmp_path / "out"``, with options by name."""

    def run(rows: Path | list[Path], **options: Any) -> SimpleNamespace:
        options.setdefault("tokenizer", tokenizer_models["bpe"])
        options.setdefault("output", tmp_path / "out")
        workers = options.pop("workers", None)
        files = rows if isinstance(rows, list) else [rows]
        extra = {name: options.pop(name) for name in ("on_event", "should_stop") if name in options}
        return SimpleNamespace(**prepare_data(PrepareOptions(rows=files, **options), workers=workers, **extra))

    return run


@pytest.fixture(scope="session")
def merging_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a byte-level tokenizer whose tokens span prompt and answer wherever they can."""
    return train_merging_tokenizer(tmp_path_factory.mktemp("merging") / "tokenizer")

"""Writers with the faults that the sweeps are there to find; a warm run can be given one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def in_place() -> None:
    """Directories are written where they are read, and read without a look at their digests."""
    from llamatune.checkpoints import training_checkpoint
    from llamatune.formats.manifest import MANIFEST, Staging
    from llamatune.safe_reading import digest_file
    from llamatune.strict_json import dump_json

    @contextlib.contextmanager
    def build(path: Path, kind: str, inputs: dict[str, Any], overwrite: bool = False) -> Iterator[Staging]:
        path.mkdir(parents=True, exist_ok=True)
        for old in path.iterdir():
            old.unlink()
        product = Staging(path)
        yield product
        facts = {"kind": kind, "schema": 1, "inputs": inputs, "facts": product.facts}
        made = {
            file.name: {"bytes": file.stat().st_size, "sha256": digest_file(file)}
            for file in path.iterdir() if file.name != MANIFEST
        }  # fmt: skip
        (path / MANIFEST).write_bytes(dump_json({**facts, "files": made}))

    training_checkpoint.build_directory = build
    training_checkpoint.verify_product = lambda path: None


def silent() -> None:
    """A failed write of the adapter is passed over."""
    from llamatune.training.save_and_resume import RunOutput

    write = RunOutput.write_final

    def write_final(self: RunOutput, *given: Any) -> None:
        with contextlib.suppress(Exception):
            write(self, *given)

    RunOutput.write_final = write_final


def unsynced() -> None:
    """Nothing is made durable."""
    import os

    os.fsync = lambda descriptor: None

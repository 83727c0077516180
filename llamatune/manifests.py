"""Manifests of products, read with distrust, and products compared with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError, Stopped
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.files import MANIFEST, open_regular, read_json

_LARGEST_MANIFEST = 16 << 20
_BLOCK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class OtherVersion(CheckpointError):
    """Whole, as far as can be told, but written by another version of llamatune."""

    def __init__(self, schema: object, where: Path) -> None:
        super().__init__(f"written by another version (schema {schema!r})", where, "use the version that wrote it")


@dataclass(frozen=True)
class Manifest:
    """What a product says of itself; ``files`` are (bytes, SHA-256) by path relative to the product."""

    kind: str
    inputs: Any
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())


def has_manifest(directory: Path) -> bool:
    """Whether anything stands under the manifest's name; a dangling link counts, and is refused when it is read."""
    return os.path.lexists(directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest:
    """Read ``llamatune.json`` of a product.

    Raises:
        CheckpointError: no regular file, no strict JSON, another schema, or entries that no product of ours has, such
            as a path that leads out of the directory.
    """
    path = directory / MANIFEST
    raw = read_json(path, max_bytes=_LARGEST_MANIFEST)
    if raw.get("schema") != 1:
        raise OtherVersion(raw.get("schema"), path)
    kind, facts, files = raw.get("kind"), raw.get("facts"), raw.get("files")
    if not isinstance(kind, str) or not isinstance(facts, dict) or not isinstance(files, dict) or not files:
        raise CheckpointError("not the manifest of a product", path, "fetch or make it again")
    return Manifest(kind, raw.get("inputs"), facts, {name: _entry(name, found, path) for name, found in files.items()})


def _entry(name: str, found: Any, where: Path) -> tuple[int, str]:
    parts = PurePosixPath(name).parts
    plain = parts and name == "/".join(parts) and ".." not in parts and "\0" not in name and name != MANIFEST
    if not plain or len(name) > 1000 or any(len(part.encode()) > 255 for part in parts):
        raise CheckpointError(f"names the unsafe path {name[:80]!r}", where, "do not use this directory")
    size, digest = (found.get("bytes"), found.get("sha256")) if isinstance(found, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CheckpointError(f"has no size and SHA-256 of {name[:80]!r}", where, "fetch or make it again")
    return size, digest


def finished_product(path: Path, kind: str, inputs: dict[str, Any]) -> Manifest | None:
    """The manifest at ``path`` if it describes a complete product of the same kind and inputs, else None.

    Files are compared by size (reading gigabytes again to find out that nothing is to be done would be absurd).
    """
    try:
        manifest = read_manifest(path)
    except LlamatuneError:
        return None
    same = manifest.kind == kind and manifest.inputs == json.loads(json.dumps(inputs))
    return manifest if same and not _misfits(path, manifest) else None


def verify_product(directory: Path, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> Manifest:
    """Compare every byte of a product with its manifest, which is returned.

    Raises:
        CheckpointError: files that are missing, or of another size or content; the first is named, all are counted.
        Stopped: ``should_stop`` said so.
    """
    manifest = read_manifest(directory)
    faults = _misfits(directory, manifest)
    done = 0
    for name, (size, digest) in manifest.files.items():
        if name not in faults and _digest(directory / name, done, manifest.bytes, on_event, should_stop) != digest:
            faults[name] = "its content does not match the manifest's SHA-256"
        done += size
    if faults:
        name, what = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more: {', '.join([*faults][1:4])})" if len(faults) > 1 else ""
        raise CheckpointError(what + more, directory / name, "fetch or make it again")
    return manifest


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """What lies in a product's directory and is none of its files."""
    found = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir())
    return [name for name in found if name != MANIFEST and name not in manifest.files]


def _misfits(directory: Path, manifest: Manifest) -> dict[str, str]:
    """What is missing or has another size, by name."""
    faults = {}
    for name, (size, _) in manifest.files.items():
        path = directory / name
        if not path.exists():
            faults[name] = "missing"
        elif not path.is_file():
            faults[name] = "not a regular file"
        elif path.stat().st_size != size:
            faults[name] = f"{path.stat().st_size:,} bytes where the manifest says {size:,}"
    return faults


def _digest(path: Path, done: int, total: int, on_event: OnEvent, should_stop: ShouldStop) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK):
                if should_stop():
                    raise Stopped("stopped while verifying", path, "run the same command again")
                digest.update(block)
                done += len(block)
                on_event(Progress("bytes verified", done, total))
    except OSError as fault:
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None
    return digest.hexdigest()

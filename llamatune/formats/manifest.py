"""``llamatune.json``, the manifest of a product: its kind, its inputs, its facts, and size and SHA-256 of each file.

Every directory that a verb makes is a product: a prepared directory, checkpoint, adapter, model or NF4 cache.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from llamatune.durable_writing import staged_directory, sync, writing
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.formats.begun_files import BegunFile
from llamatune.formats.own_digest import dump_with_digest, refuse_altered
from llamatune.formats.recorded_files import misfits, verify_files
from llamatune.safe_reading import digest_bytes, digest_file, read_bytes
from llamatune.strict_json import parse_json_object

MANIFEST = "llamatune.json"
END_OF_TURN = "end_of_turn_id"
"""In the facts of a prepared directory: the special token that ends the assistant's turns, beside the EOS of rows."""
SCHEMA = 1
_KEYS = ("kind", "schema", "inputs", "facts", "files")
_LARGEST_MANIFEST = 16 << 20
_AGAIN = "fetch or make it again"
T = TypeVar("T")


class OtherVersion(CheckpointError):
    """Whole, as far as can be told, but written by another version of llamatune."""

    def __init__(self, schema: object, where: Path) -> None:
        super().__init__(f"written by another version (schema {schema!r})", where, "use the version that wrote it")


class PendingDigest(Protocol):
    """A file's SHA-256 that is being computed."""

    def result(self) -> str: ...

    def abandon(self) -> None: ...


@dataclass
class Staging:
    """A product in the making: write files below ``path``, and what readers should know into ``facts``.

    ``digests`` holds the SHA-256 of files that were digested while they were written, by name; others are read again.
    ``digesting`` holds those that are still being computed, ``begun`` files that are partly written already.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    digesting: dict[str, PendingDigest] = field(default_factory=dict)
    begun: Mapping[str, BegunFile] = field(default_factory=dict)

    def finish_digests(self, but: int = 0) -> None:
        """Wait for digests, the oldest first, until no more than ``but`` are still being computed."""
        while len(self.digesting) > but:
            name = next(iter(self.digesting))
            self.digests[name] = self.digesting[name].result()
            del self.digesting[name]


@contextlib.contextmanager
def build_directory(path: Path, kind: str, inputs: dict[str, Any], overwrite: bool = False) -> Iterator[Staging]:
    """Yield an empty staging directory beside ``path``; when the block ends it becomes ``path``, with a manifest.

    The order is: files synced, manifest with their digests synced, directory synced, rename, parent synced. If the
    block raises, nothing of it remains, and ``path`` is as it was.
    """
    with staged_directory(path, overwrite) as directory:
        product = Staging(directory)
        try:
            yield product
        except BaseException:
            for pending in product.digesting.values():
                pending.abandon()
            raise
        for entry in directory.rglob("*"):
            sync(entry)
        product.finish_digests()
        written = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST)
        files = {}
        for file in written:
            name = file.relative_to(directory).as_posix()
            digest = product.digests.get(name) or digest_file(file)
            files[name] = {"bytes": file.stat().st_size, "sha256": digest}
        values = (kind, SCHEMA, inputs, product.facts, files)
        with writing(directory / MANIFEST) as manifest:
            manifest.write(dump_with_digest(dict(zip(_KEYS, values, strict=True))))


@dataclass(frozen=True)
class Manifest:
    """A manifest as read. ``files`` are (bytes, SHA-256) by path relative to the product; ``digest`` is its own.

    The properties are facts with their types checked; each is None where the product does not have it.
    """

    path: Path
    digest: str
    schema: Any
    kind: Any
    inputs: Any
    facts: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def template(self) -> dict[str, Any] | None:
        """The prompt template that the rows were encoded with."""
        return self._fact("template", self.facts.get("template"), dict)

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the model that an adapter was trained on, or that was merged."""
        return self._fact("base_fingerprint", self.facts.get("base_fingerprint"), str)

    @property
    def base_path(self) -> str | None:
        """The base that an adapter was trained on, as the user named it."""
        return self._fact("base_path", self.facts.get("base_path"), str)

    @property
    def end_of_turn(self) -> int | None:
        """The special token that ends the turns of prepared chats."""
        return self._fact(END_OF_TURN, self.facts.get(END_OF_TURN), int)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer that a prepared directory was made with."""
        tokenizer: dict[str, Any] = self._fact("tokenizer", self.facts.get("tokenizer"), dict) or {}
        return self._fact("the tokenizer's fingerprint", tokenizer.get("fingerprint"), str)

    @property
    def max_position_embeddings(self) -> int | None:
        """The context length of a merged model in Meta's format, whose ``params.json`` cannot hold it."""
        noted = self.facts.get("max_position_embeddings")
        return noted if type(noted) is int else None

    @property
    def merged_adapters(self) -> list[str]:
        """The SHA-256 of each adapter that is merged into a model."""
        digests = self.facts.get("adapters")
        return [digest for digest in digests if isinstance(digest, str)] if isinstance(digests, list) else []

    def _fact(self, name: str, value: Any, kind: type[T]) -> T | None:
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{name} is malformed", self.path, "fetch or make it again")
        return value


def has_manifest(directory: Path) -> bool:
    """Whether anything has the manifest's name; a dangling link counts and is refused when it is read."""
    return os.path.lexists(directory / MANIFEST)


def find_manifest(directory: Path, error: type[LlamatuneError] = CheckpointError) -> Manifest | None:
    """The manifest in ``directory``, None if there is none; of another schema only the facts are read.

    Raises:
        error: no regular file, no strict JSON, or of our schema and with a key or value that does not fit it, which is
            named; or a file entry that is unsafe, such as a path that leads out of the directory.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    # Here, since the command line is built from modules that import this one, and pydantic is slow to load.
    from llamatune.formats.file_schema import LARGEST_WHOLE, parse_values
    from llamatune.formats.manifest_schema import FACTS, Facts, ProductManifest

    content = read_bytes(path, error, _LARGEST_MANIFEST)
    raw = parse_json_object(content, path, error)
    schema = raw.get("schema")
    known = len(schema) <= 80 if isinstance(schema, str) else type(schema) is int and 0 < schema < LARGEST_WHOLE
    if not known:
        raise error("not the manifest of a product", path, _AGAIN)
    if schema == SCHEMA:
        parse_values(ProductManifest, raw, path, error, _AGAIN)
        parse_values(FACTS.get(raw["kind"], Facts), raw["facts"], f"{path}, facts", error, _AGAIN)
        entries = file_entries(raw["files"], path, error)
        return Manifest(path, digest_bytes(content), schema, raw["kind"], raw["inputs"], raw["facts"], entries)
    facts = raw["facts"] if isinstance(raw.get("facts"), dict) else {}
    parse_values(Facts, facts, f"{path}, facts", error, _AGAIN)
    return Manifest(path, digest_bytes(content), schema, raw.get("kind"), raw.get("inputs"), facts, {})


def manifest_if_readable(directory: Path) -> Manifest | None:
    """The manifest in ``directory``; None if there is none or it is broken."""
    with contextlib.suppress(LlamatuneError):
        return find_manifest(directory)
    return None


def file_entries(
    files: Mapping[str, Any], where: Path, error: type[LlamatuneError] = CheckpointError
) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file, out of JSON; ``error`` names ``where`` if one is unsafe or malformed."""
    return {name: _file_entry(name, entry, where, error) for name, entry in files.items()}


def _file_entry(name: str, entry: Any, where: Path, error: type[LlamatuneError]) -> tuple[int, str]:
    parts = PurePosixPath(name).parts
    plain = parts and name == "/".join(parts) and ".." not in parts and "\0" not in name and name != MANIFEST
    if not plain or len(name) > 1000 or any(len(part.encode()) > 255 for part in parts):
        raise error(f"names the unsafe path {name[:80]!r}", where, "do not use this directory")
    return entry["bytes"], entry["sha256"]


def finished_product(path: Path, kind: str, inputs: dict[str, Any]) -> Manifest | None:
    """The manifest at ``path`` if it describes a complete product of the same kind and inputs, else None.

    Files are compared by size alone: their content may be gigabytes.
    """
    wanted = (SCHEMA, kind, json.loads(json.dumps(inputs)))
    manifest = manifest_if_readable(path)
    if manifest is None or (manifest.schema, manifest.kind, manifest.inputs) != wanted or misfits(path, manifest.files):
        return None
    return manifest


def verify_product(directory: Path, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop) -> Manifest:
    """Compare every byte of a product with its manifest, which is returned.

    Raises:
        CheckpointError: files that are missing, or of another size or content; the first is named, all are counted.
            No manifest, or one of another schema (``OtherVersion``).
        Stopped: ``should_stop`` said so.
    """
    manifest = find_manifest(directory)
    if manifest is None:
        raise CheckpointError("no such file", directory / MANIFEST)
    if manifest.schema != SCHEMA:
        raise OtherVersion(manifest.schema, manifest.path)
    verify_files(directory, manifest.files, on_event, should_stop)
    return manifest


def refuse_altered_manifest(directory: Path) -> None:
    """Raise ``CheckpointError`` if the manifest is not as it was written; those of earlier versions cannot tell."""
    refuse_altered(directory / MANIFEST, _KEYS, _LARGEST_MANIFEST)


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """The files in a product's directory that its manifest does not list."""
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir())
    return [name for name in names if name != MANIFEST and name not in manifest.files]

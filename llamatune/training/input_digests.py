"""SHA-256 of a run's base and prepared rows, taken behind its first steps and compared with what is recorded of them.

A base's manifest, if it has one, and the checkpoint that a run goes on from say what its files were; prepared rows have
a manifest. The first rank of each node digests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamatune.checkpoints.base_files import base_files
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ShouldStop
from llamatune.formats.background_digests import BackgroundDigests
from llamatune.formats.manifest import MANIFEST, file_entries, find_manifest
from llamatune.formats.prepared import AT_ONCE_BYTES
from llamatune.formats.state_json import STATE
from llamatune.ranks import Ranks
from llamatune.spec import RunSpec
from llamatune.training.inputs import Inputs

_PATIENCE_S = 1.0
"""How long a checkpoint waits for digests that it only records: a base of about 1 GB is known before the first."""
_OF_MANIFEST = "its content does not match the manifest's SHA-256"
_EDITED = f"fetch it again, or remove {MANIFEST} if you changed it yourself"
_RESTORE = "restore the file, or choose another training.output_dir"
_PREPARE_AGAIN = "prepare the data again"

Entry = tuple[int, str]
"""Size in bytes and SHA-256 of a file."""
DigestFiles = Callable[[Mapping[str, Path]], BackgroundDigests]
"""Makes the digests of files: of this run alone, or of several (``SharedDigests``)."""


class InputDigests:
    """Finds out whether the files that a run reads are those that its records tell of; make it with ``digesting``.

    The base is among them with ``model.verify: full``. ``restore`` gives what a checkpoint recorded of it, and
    ``state`` is what the next checkpoint records.
    """

    def __init__(
        self, spec: RunSpec, inputs: Inputs, ranks: Ranks, on_event: OnEvent, digest: DigestFiles = BackgroundDigests
    ) -> None:
        self._ranks, self._on_event, self._where = ranks, on_event, Path(spec.model.path)
        rows = [manifest for manifest in inputs.row_manifests if manifest.bytes > AT_ONCE_BYTES]
        listed = {str(one.path.parent / name): entry for one in rows for name, entry in one.files.items()}
        self._expected = {path: (entry, _OF_MANIFEST, _PREPARE_AGAIN) for path, entry in listed.items()}
        self._names: dict[str, str] = {}
        if spec.model.verify == "full" and inputs.checkpoint is not None:
            self._names = {str(path): name for name, path in base_files(inputs.checkpoint).items()}
            entries = self._manifest_of_base()
            listed = {path: entries[name] for path, name in self._names.items() if name in entries}
            self._expected |= {path: (entry, _OF_MANIFEST, _EDITED) for path, entry in listed.items()}
        paths = dict.fromkeys([*self._expected, *self._names]) if ranks.is_first or ranks.local_rank == 0 else ()
        self._digests = digest({path: Path(path) for path in paths})
        self._settled = not self._expected and not self._names
        self._recorded: dict[str, Entry] = {}
        self._compared = 0

    def _manifest_of_base(self) -> Mapping[str, Entry]:
        try:
            manifest = find_manifest(self._where)
        except CheckpointError as fault:
            self._on_event(Notice(f"the files of the base are not compared with its manifest: {fault}", "warning"))
            return {}
        return {} if manifest is None else manifest.files

    def restore(self, recorded: Mapping[str, Any], checkpoint: Path) -> None:
        """Expect of the base's files what a checkpoint recorded."""
        self._recorded = file_entries(recorded, checkpoint / STATE)
        if not self._names:
            return
        if gone := [name for name in self._recorded if name not in self._names.values()]:
            raise CheckpointError("the run began with this file, and it is missing", self._where / gone[0], _RESTORE)
        if unknown := [name for name in self._names.values() if name not in self._recorded]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            what = f"{self._where}: the run has no SHA-256 of {unknown[0]}{more} yet"
            self._on_event(Notice(f"{what}; a change since it began would not be noticed, later ones are"))

    def start(self) -> None:
        """Digest from now on."""
        self._digests.start()

    def abandon(self) -> None:
        """Digest no more."""
        self._digests.abandon()

    def state(self) -> dict[str, Any] | None:
        """Size and SHA-256 of the base's files, as far as they are known; None: of none."""
        found = {self._names[path]: entry for path, entry in self._digests.found.items() if path in self._names}
        known = {**found, **self._recorded}
        return {name: {"bytes": size, "sha256": digest} for name, (size, digest) in known.items()} or None

    def check(self) -> None:
        """Raise ``CheckpointError`` if a file is known by now not to be what is recorded of it."""
        found = list(self._digests.found.items())[self._compared :]
        for path, entry in found:
            if path in self._expected and self._expected[path][0] != entry:
                _, what, todo = self._expected[path]
                raise CheckpointError(what, path, todo)
            if entry != self._recorded.get(self._names.get(path, ""), entry):
                raise CheckpointError("its content is not what it was when the run began", path, _RESTORE)
        self._compared += len(found)

    def settle(self, wholly: bool, should_stop: ShouldStop) -> bool:
        """Wait for the digests; whether all ranks have all of them, and none disagrees.

        All ranks call it at the same time, before anything is written. Where there is nothing to compare with, it waits
        no longer than a second, unless ``wholly``; ``should_stop`` may end a longer wait.

        Raises:
            CheckpointError: a file is not what is recorded of it, or not the same on every node.
        """
        if self._settled:
            return True
        wholly = wholly or bool(self._recorded or self._expected)
        done = self._digests.wait(_PATIENCE_S)
        if wholly and not done and not should_stop():
            self._on_event(Notice(f"{self._where}: waiting for the SHA-256 of what the run reads"))
            done = self._digests.wait(None, should_stop)
        self.check()
        own: list[Any] = [done, self._digests.found]
        answers = self._ranks.gather(own)
        first = answers[0][1]
        for rank, (_, found) in enumerate(answers):
            for path in found.keys() & first.keys():
                if list(found[path]) != list(first[path]):
                    what = f"rank {rank} reads another content than rank 0"
                    raise CheckpointError(what, path, "every node must see the same files")
        self._settled = all(done for done, _ in answers)
        if self._settled:
            for path, why in self._digests.unreadable.items():
                self._on_event(Notice(f"{path}: its SHA-256 is not known, so it is not compared: {why}", "warning"))
        return self._settled


@contextlib.contextmanager
def digesting(
    spec: RunSpec, inputs: Inputs, ranks: Ranks, on_event: OnEvent, digest: DigestFiles = BackgroundDigests
) -> Iterator[InputDigests]:
    """The digests of a run's inputs, which end with the block; ``start`` begins with them."""
    digests = InputDigests(spec, inputs, ranks, on_event, digest)
    try:
        yield digests
    finally:
        digests.abandon()

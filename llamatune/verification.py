"""``llamatune verify``: a directory against its manifest, byte for byte, and a run's log against its checkpoints.

A directory without a manifest (a model from elsewhere, PEFT's own adapter) is checked for its structure: headers
against sizes, index against shards, tensors against the configuration.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llamatune.checkpoints.adapter import load_adapter
from llamatune.checkpoints.adapter_config import CONFIG_FILE
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.durable_writing import STAGING
from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError, Stopped
from llamatune.events import Notice, OnEvent, ShouldStop, Step, ignore_event, never_stop
from llamatune.formats.manifest import MANIFEST, has_manifest, unlisted_files, verify_product
from llamatune.formats.metrics import LONGEST_LINE, read_lines
from llamatune.formats.metrics_lines import check_line, parse_line
from llamatune.formats.origin_json import read_origin
from llamatune.formats.safetensors import read_header
from llamatune.formats.state_json import STATE, SavedState, list_checkpoints, read_progress
from llamatune.formats.summary_json import read_summary
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.spec import load_stored_spec
from llamatune.training.run_file_names import BEST, CHECKPOINTS, METRICS, ORIGIN, SPEC, SUMMARY
from llamatune.training.run_lock import LOCK

_READ_BY_NAME = re.compile(
    r".*\.(safetensors|pth|bin|index\.json)|(adapter_|generation_)?config\.json|params\.json|state\.json"
)
"""Names that readers of models, adapters and checkpoints open even if no manifest lists them."""


@dataclass(frozen=True)
class Verified:
    """A directory without faults. ``checked`` is ``content`` where there was a manifest, else ``structure``.

    ``unlisted`` are files that are not in the manifest and that no reader of ours opens. A run or a cache has
    ``parts``; ``steps`` counts the steps in a run's log.
    """

    path: str
    kind: str
    checked: Literal["content", "structure"]
    files: int
    bytes: int
    unlisted: list[str] = field(default_factory=list)
    parts: list[Verified] = field(default_factory=list)
    steps: int | None = None
    finished: bool | None = None
    ok: bool = True


def verify(
    path: Path,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    variant: str | None = None,
) -> Verified:
    """Check a run, checkpoint, adapter, model, prepared directory or cache of quantised weights.

    ``variant``: of the weights of a model without a manifest.

    Raises:
        CheckpointError: it is none of these, or a file of it is missing, surplus, cut, changed or unsafe.
        EnvironmentFault: a file cannot be read. Stopped: ``should_stop`` said so.
    """
    if not path.is_dir():
        what = "a file where a directory is expected" if path.exists() else "no such directory"
        raise CheckpointError(what, path, "give a run, checkpoint, adapter, model or prepared directory")
    try:
        if (path / LOCK).exists() or all(os.path.lexists(path / name) for name in (SPEC, METRICS)):
            return _verify_run(path, on_event, should_stop)
        if has_manifest(path):
            return _verify_content(path, on_event, should_stop)
        quantized = (entry for dtype in QUANTIZED_DTYPES for entry in path.glob(f"{dtype}-*"))
        if cached := sorted(entry for entry in quantized if has_manifest(entry)):
            return _whole(path, "quantized-cache", [_verify_content(entry, on_event, should_stop) for entry in cached])
        return _verify_structure(path, variant, on_event)
    except (CheckpointError, EnvironmentFault, Stopped):
        raise
    except LlamatuneError as fault:  # such as a SpecError: elsewhere a usage error, here a broken file
        raise CheckpointError(fault.what, fault.where, fault.todo) from None


def _whole(path: Path, kind: str, parts: list[Verified], **more: Any) -> Verified:
    files, size = sum(part.files for part in parts), sum(part.bytes for part in parts)
    return Verified(str(path), kind, "content", files, size, parts=parts, **more)


def _verify_content(path: Path, on_event: OnEvent, should_stop: ShouldStop) -> Verified:
    manifest = verify_product(path, on_event, should_stop)
    for name in manifest.files:
        if name.endswith(".safetensors"):
            read_header(path / name)
    unlisted = unlisted_files(path, manifest)
    for name in unlisted:
        base = name.rpartition("/")[2]
        if _READ_BY_NAME.fullmatch(base) or base.startswith(STAGING):
            raise CheckpointError("not in the manifest, but readers would use it", path / name, "remove it")
    if manifest.kind == "checkpoint":
        read_progress(path)
    return Verified(str(path), manifest.kind, "content", len(manifest.files), manifest.bytes, unlisted)


def _verify_structure(path: Path, variant: str | None, on_event: OnEvent) -> Verified:
    if (path / STATE).exists():
        raise CheckpointError("a checkpoint of a run without its manifest", path / MANIFEST, "remove the checkpoint")
    on_event(Notice(f"{path}: no manifest, so its structure is checked and not its content", "warning"))
    if (path / CONFIG_FILE).exists():
        header = load_adapter(path).header
        assert header is not None
        kind, files = "adapter", {header.config.fields.path, header.file}
    else:
        checkpoint = open_checkpoint(path, variant=variant)
        kind, files = "model", {part.path for parts in checkpoint.parts.values() for part in parts}
    return Verified(str(path), kind, "structure", len(files), sum(file.stat().st_size for file in files))


def _verify_run(path: Path, on_event: OnEvent, should_stop: ShouldStop) -> Verified:
    spec = load_stored_spec(path / SPEC)
    read_origin(path / ORIGIN)
    summary = read_summary(path / SUMMARY) if os.path.lexists(path / SUMMARY) else None
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    last = read_progress(checkpoints[0]) if checkpoints else None
    steps = _verify_log(path / METRICS, last, summary)
    final = "model" if spec.lora is None else "adapter"
    best_step = summary["best_step"] if summary is not None else None if last is None else last.position.best_step
    due = {final: summary is not None, BEST: best_step is not None}
    products = [path / name for name, is_due in due.items() if is_due or os.path.lexists(path / name)]
    parts = []
    for part in (*checkpoints, *products):
        try:
            parts.append(_verify_content(part, on_event, should_stop))
        except CheckpointError:
            if part in products or part.exists():
                raise  # else the run, which is still going on, has pruned it
    if summary is None:
        on_event(Notice(f"{path}: not finished; the command that started it continues it"))
    return _whole(path, "run", parts, steps=steps, finished=summary is not None)


def _verify_log(path: Path, last: SavedState | None, summary: dict[str, Any] | None) -> int:
    """The number of steps in a run's log: each once and in order, as many as checkpoint and summary say.

    The last line may be torn only after the last checkpoint of a run that is not finished: it is cut when the run
    continues.
    """
    synced = 0 if last is None else last.metrics_bytes
    step = at_checkpoint = end = 0
    for number, end, line in read_lines(path):
        torn = not line.endswith(b"\n") and len(line) < LONGEST_LINE
        if torn and summary is None and end > synced:
            break
        try:
            entry = parse_line(line)
        except ValueError as fault:
            raise CheckpointError(f"not a line of strict JSON: {fault}", f"{path}:{number}") from None
        try:
            check_line(entry)
        except ValueError as fault:
            raise CheckpointError(str(fault), f"{path}:{number}", "was it edited?") from None
        if entry.get("event") == Step.event:
            step += 1
            if entry.get("step") != step:
                raise CheckpointError(f"step {entry.get('step')} where {step} should be", f"{path}:{number}")
        if end <= synced:
            at_checkpoint = step
    if end < synced:
        raise CheckpointError(f"{end:,} bytes where the last checkpoint remembers {synced:,}", path)
    if last is not None and at_checkpoint != last.step:
        raise CheckpointError(f"holds {at_checkpoint} steps where the checkpoint has {last.step}", path)
    if summary is not None and step != summary["steps"]:
        raise CheckpointError(f"holds {step} steps where the summary has {summary['steps']}", path)
    return step

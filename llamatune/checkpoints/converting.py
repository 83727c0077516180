"""Converts a model between Hugging Face's format, Meta's and GGUF, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.companion_files import copy_papers
from llamatune.checkpoints.config_json import EMBEDDING, HEAD
from llamatune.checkpoints.conversion_limits import refuse_what_gguf_lacks, refuse_what_meta_lacks, warn_of_lost_tokens
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.gguf_blocks import Q8_0, holds
from llamatune.checkpoints.gguf_model import MODEL_FILE, GgufCheckpoint, stored_type, write_gguf_model
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.meta_weights import write_meta
from llamatune.checkpoints.model_directory import warn_of_missing_head
from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.checkpoints.weights import Weight
from llamatune.command_options.conversion import ConvertOptions
from llamatune.durable_writing import refuse_occupied, refuse_small_disk, writing
from llamatune.errors import CheckpointError, LlamatuneError, SpecError, Stopped
from llamatune.events import Event, Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.begun_files import BegunFile
from llamatune.formats.gguf import SUFFIX, is_gguf, stored_bytes
from llamatune.formats.manifest import (
    MANIFEST,
    Manifest,
    Staging,
    build_directory,
    finished_product,
    manifest_if_readable,
)
from llamatune.model.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from llamatune.output_files import is_stream, output_file, refuse_replacing, write_output
from llamatune.safe_reading import digest_bytes, digest_file
from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer
from llamatune.tokenizers.gguf_rebuilt import write_tokenizer
from llamatune.tokenizers.gguf_vocabulary import Entries, vocabulary_entries

KIND = "converted"
_CARRIED = ("adapters", "template", "base_fingerprint", "base_forced")
"""Facts of a merge that hold for a copy of it too."""
_DIGESTED = (".json", ".jinja", ".model")
"""Small files of a model directory, which decide what is written of configuration and tokenizer."""
_SAME_ROWS = 1024


@dataclass(frozen=True)
class ConvertReport:
    """What was written. ``sha256`` is that of a single file; a directory has a manifest.

    ``already_done``: the output existed before, made of the same inputs.
    """

    output: str
    format: str
    dtype: str
    tensors: int
    bytes: int
    sha256: str | None = None
    already_done: bool = False


def convert(
    options: ConvertOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    begun: Mapping[str, BegunFile] | None = None,
) -> ConvertReport:
    """Write a model in another format, all at once or not at all. ``begun`` are files that are partly copied already.

    Raises:
        CheckpointError: the format cannot hold the model, or the dtype a weight of it; a broken or unsafe file.
        EnvironmentFault: the output is occupied, or the disk is too small.
        Stopped: ``should_stop`` said so; nothing is left behind.
    """
    with _opened(options, on_event) as (source, on_event):
        refuse_replacing(options.output, [("--model", options.model), ("--model", source.checkpoint.path)])
        if options.target == "gguf":
            refuse_what_gguf_lacks(source.checkpoint.config, source.checkpoint.path, on_event)
        if options.target == "meta":
            refuse_what_meta_lacks(source.checkpoint.config)
        return _written(dataclasses.replace(source, begun=begun or {}), options, on_event, should_stop)


@dataclass(frozen=True)
class _Source:
    """A model and a directory with Hugging Face's files of its tokenizer."""

    checkpoint: Checkpoint
    companion: Path
    digest: str
    begun: Mapping[str, BegunFile] = field(default_factory=dict)

    def vocabulary(self, on_event: OnEvent) -> Entries:
        """The keys of the tokenizer in a GGUF file; of such a file its own, and what it says of the model's origin."""
        if isinstance(self.checkpoint, GgufCheckpoint):
            return self.checkpoint.kept_entries()
        config = self.checkpoint.config
        return vocabulary_entries(self.companion, config.vocab_size, config.eos_token_ids, on_event)


@contextmanager
def _opened(options: ConvertOptions, on_event: OnEvent) -> Iterator[tuple[_Source, OnEvent]]:
    """The model, and ``on_event`` for what is read of it: notices and errors name its path, each notice comes once."""
    path, told = options.model, set[str]()
    file = _gguf_file(path)
    if file is not None and options.variant is not None:
        raise SpecError("--variant is of Hugging Face's directories", None, "a GGUF file has one set of weights")
    with tempfile.TemporaryDirectory(prefix="llamatune-") as made:
        companion = Path(made)

        def named(event: Event) -> None:
            if isinstance(event, Notice):
                event = Notice(event.message.replace(made, str(file or path)), event.kind)
                if event.message in told:
                    return
                told.add(event.message)
            on_event(event)

        try:
            yield _source(options, file, companion, named), named
        except LlamatuneError as fault:
            if made not in str(fault.where):
                raise
            where = str(fault.where).replace(made, str(file or path))
            raise type(fault)(fault.what, where, fault.todo) from None


def _source(options: ConvertOptions, file: Path | None, companion: Path, on_event: OnEvent) -> _Source:
    path = options.model
    if file is not None:
        gguf = GgufCheckpoint.open(file, on_event)
        metadata = {key: value for key, (_, value) in gguf.entries.items()}
        write_tokenizer(metadata, companion, file)
        return _Source(gguf, companion, digest_bytes(json.dumps(metadata, sort_keys=True).encode()))
    checkpoint = open_checkpoint(path, on_event, options.variant)
    warn_of_missing_head(path, checkpoint.format, checkpoint.config, on_event)
    checkpoint.config = dataclasses.replace(checkpoint.config, tie_word_embeddings=_is_tied(checkpoint))
    checkpoint.shapes = dict(checkpoint.config.parameter_shapes())
    small = sorted(entry for entry in path.iterdir() if entry.suffix in _DIGESTED and entry.name != MANIFEST)
    digests = [(entry.name, digest_file(entry)) for entry in small if entry.is_file()]
    if checkpoint.format == "meta":
        copy_huggingface_tokenizer(path, companion, on_event)
    else:
        companion = path
    return _Source(checkpoint, companion, digest_bytes(json.dumps(digests).encode()))


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant: ``path`` itself, or the only one of a directory without another model."""
    if path.suffix == SUFFIX or is_gguf(path):
        return path
    found = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    configured = any((path / name).exists() for name in ("config.json", "params.json"))
    return found[0] if len(found) == 1 and not configured else None


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding. Meta's format cannot say: its files hold the head of a tied model too."""
    config = checkpoint.config
    if config.tie_word_embeddings or checkpoint.format != "meta":
        return config.tie_word_embeddings
    size = config.vocab_size
    portions = (range(first, min(first + _SAME_ROWS, size)) for first in range(0, size, _SAME_ROWS))
    return all(torch.equal(checkpoint.rows(HEAD, rows), checkpoint.rows(EMBEDDING, rows)) for rows in portions)


def _written(source: _Source, options: ConvertOptions, on_event: OnEvent, should_stop: ShouldStop) -> ConvertReport:
    checkpoint, config, quantize = source.checkpoint, source.checkpoint.config, options.dtype == "q8_0"
    dtype = None if options.dtype in ("same", "q8_0") else TORCH_DTYPES[options.dtype]
    tensors = _Tensors(checkpoint, dtype, quantize, on_event, should_stop)
    types = {n: stored_type(shape, tensors.dtype_of(n), quantize) for n, shape in checkpoint.shapes.items()}
    if options.target == "gguf":
        needed = sum(stored_bytes(types[name], shape) for name, shape in checkpoint.shapes.items())
        stated = "q8_0" if types[EMBEDDING] == Q8_0 else DTYPE_NAMES[tensors.dtype_of(EMBEDDING)]
    else:
        needed = sum(math.prod(shape) * tensors.dtype_of(name).itemsize for name, shape in checkpoint.shapes.items())
        stated = DTYPE_NAMES[tensors.dtype_of(EMBEDDING)]
    report = ConvertReport(str(options.output), options.target, stated, len(checkpoint.shapes), needed)
    name = checkpoint.path.resolve().name.removesuffix(SUFFIX)
    if options.writes_file:
        target = output_file(options.output, options.overwrite)
        if not is_stream(target):
            refuse_small_disk(target, needed, "the converted model")
        vocabulary, digests = source.vocabulary(on_event), list[str]()
        write_output(
            target,
            lambda file: digests.append(write_gguf_model(file, config, tensors, types, vocabulary, name)),
            options.overwrite,
        )
        tensors.warn_of_broken()
        return dataclasses.replace(report, sha256=digests[0])
    inputs = {
        "base_fingerprint": fingerprint(checkpoint),
        "files": source.digest,
        "format": options.target,
        "dtype": options.dtype,
        "shards": options.shards,
        "shard_bytes": options.shard_bytes,
    }
    if (finished := finished_product(options.output, KIND, inputs)) is not None:
        return _stored_report(finished, options.output)
    refuse_occupied(options.output, options.overwrite)
    refuse_small_disk(options.output, needed, "the converted model")
    with build_directory(options.output, KIND, inputs, options.overwrite) as staging:
        if options.target == "gguf":
            vocabulary = source.vocabulary(on_event)
            with writing(staging.path / MODEL_FILE, needed) as file:
                digest = write_gguf_model(file, config, tensors, types, vocabulary, name)
            staging.digests[MODEL_FILE] = digest
        else:
            staging.begun = source.begun
            _write_directory(staging, source, tensors, options, on_event)
        copy_papers(options.model, staging.path)
        before = manifest_if_readable(options.model)
        staging.facts |= {key: before.facts[key] for key in _CARRIED if before is not None and key in before.facts}
        staging.facts["report"] = asdict(report)
    tensors.warn_of_broken()
    return report


def _write_directory(
    staging: Staging, source: _Source, tensors: _Tensors, options: ConvertOptions, on_event: OnEvent
) -> None:
    config, companion, dtype_of, shards = source.checkpoint.config, source.companion, tensors.dtype_of, options.shards
    if options.target == "hf":
        write_huggingface(staging, config, tensors, dtype_of, companion, on_event, shards, options.shard_bytes)
        return
    write_meta(staging, config, tensors, dtype_of, companion, on_event, shards or 1)
    warn_of_lost_tokens(source.companion, staging.path, options.output, on_event)
    staging.facts["max_position_embeddings"] = config.max_position_embeddings  # params.json has no key for it


@dataclass
class _Tensors:
    """The weights by name, each cast to its dtype while it is written."""

    checkpoint: Checkpoint
    dtype: torch.dtype | None
    quantize: bool
    on_event: OnEvent
    should_stop: ShouldStop
    done: int = 0
    broken: str | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.checkpoint.dtype(name)

    def __call__(self, name: str) -> Weight:
        if self.should_stop():
            raise Stopped("stopped while converting", self.checkpoint.path, "run the same command again")
        self.done = min(self.done + 1, len(self.checkpoint.shapes))
        self.on_event(Progress("converting", self.done, len(self.checkpoint.shapes)))
        if self.quantize or self.checkpoint.is_made(name) or self.dtype_of(name) != self.checkpoint.dtype(name):
            return self._cast(name)
        return self.checkpoint.stored(name)

    def _cast(self, name: str) -> Iterator[torch.Tensor]:
        """Portions of rows in their new dtype."""
        read, dtype = self.checkpoint.row_reader(name), self.dtype_of(name)
        kind = stored_type(self.checkpoint.shapes[name], dtype, True) if self.quantize else DTYPE_NAMES[dtype]
        for rows in self.checkpoint.row_portions(name):
            stored = read(rows)
            W = stored.to(dtype)
            if not is_finite(W) or (kind in (Q8_0, "F16") and not holds(W, kind)):
                if is_finite(stored):
                    what = f"{name} holds {float(stored.abs().max()):g}, which {kind} cannot hold"
                    raise CheckpointError(what, self.checkpoint.path, "choose another --dtype")
                self.broken = self.broken or name
            yield W

    def warn_of_broken(self) -> None:
        if self.broken is not None:
            what = f"{self.checkpoint.path}: {self.broken} holds NaN or infinity, and so does the copy"
            self.on_event(Notice(what, "warning"))


def _stored_report(manifest: Manifest, output: Path) -> ConvertReport:
    try:
        report = dict(manifest.facts["report"])
        known = {field.name: report[field.name] for field in fields(ConvertReport)}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError("its manifest holds no report", output / MANIFEST, "choose another output") from None
    return ConvertReport(**{**known, "output": str(output), "already_done": True})

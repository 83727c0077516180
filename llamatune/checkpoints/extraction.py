"""Makes an adapter of two models: the truncated SVD of what tuning changed in each matrix, one matrix at a time."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from llamatune.checkpoints.adapter import Adapter, write_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.command_options.conversion import ExtractOptions
from llamatune.durable_writing import refuse_occupied, refuse_small_disk
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.manifest import MANIFEST, build_directory, finished_product, manifest_if_readable
from llamatune.output_files import refuse_replacing
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, linear_path

_LARGEST_FULL = 1024
"""Up to this many rows or columns a matrix is decomposed fully; beyond, by subspace iteration."""
_SPARE_DIRECTIONS, _ITERATIONS = 16, 6
"""Of subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4). A difference of rank r is found exactly."""
_LISTED = 5
_LAYOUT = ("num_attention_heads", "num_key_value_heads", "head_dim")
_SETTINGS = ("rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window")


@dataclass(frozen=True)
class ExtractedMatrix:
    """The update of one matrix. ``energy`` is the share of the squared difference that it holds, by rank.

    ``norm`` is the Frobenius norm of the whole difference; ``method``: ``full`` or ``randomised``.
    """

    name: str
    norm: float
    method: Literal["full", "randomised"]
    energy: dict[int, float]

    @property
    def retained(self) -> float:
        """At the adapter's rank."""
        return self.energy[max(self.energy)]


@dataclass(frozen=True)
class ExtractReport:
    """What was written. ``retained_energy`` is of all matrices together, ``left_out`` what no LoRA can hold.

    ``left_out`` has the norm of the difference and of the base's tensor, by name.
    """

    output: str
    r: int
    target_modules: list[str]
    retained_energy: float
    matrices: list[ExtractedMatrix]
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)
    already_done: bool = False


def extract_lora(
    options: ExtractOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> ExtractReport:
    """Write the adapter of rank r that is nearest to the difference of two models, all at once or not at all.

    Raises:
        CheckpointError: models of two shapes, equal ones, weights that are not finite; a broken or unsafe file.
        EnvironmentFault: the output is occupied, or the disk is too small.
        Stopped: ``should_stop`` said so; nothing is left behind.
    """
    base, tuned = open_checkpoint(options.base, on_event), open_checkpoint(options.tuned, on_event)
    _refuse_other_shapes(base, tuned)
    other = _computed_otherwise(base, tuned)
    refuse_replacing(options.output, [("--base", options.base), ("--tuned", options.tuned)])
    wanted = _target_modules(options)
    base_fingerprint = fingerprint(base)
    inputs = {
        "base_fingerprint": base_fingerprint,
        "tuned_fingerprint": fingerprint(tuned),
        "r": options.r,
        "target_modules": options.target_modules,
    }
    finished = finished_product(options.output, "adapter", inputs)
    if finished is not None:
        return _stored_report(finished.facts, options)
    refuse_occupied(options.output, options.overwrite)
    largest = AdapterSpec(options.r, options.r, target_modules=wanted)
    refuse_small_disk(options.output, 4 * sum(map(_size, dict(largest.checkpoint_shapes(base.config)).values())), "it")
    found = _Differences(base, tuned, options.r, wanted, on_event, should_stop)
    found.compute()
    modules = sorted({name.split(".")[-2] for name in found.updates})
    if not modules:
        raise CheckpointError(
            "the two models have the same linear layers", options.tuned, "there is nothing to extract"
        )
    spec = AdapterSpec(options.r, float(options.r), target_modules=tuple(modules))
    tensors: dict[str, Tensor] = {}
    for layer in range(base.config.num_hidden_layers):
        for module in modules:
            stem = f"model.layers.{layer}.{linear_path(module)}"
            out_features, in_features = base.config.linear_shape(module)
            zero = torch.zeros(options.r, in_features), torch.zeros(out_features, options.r)
            A, B = found.updates.get(f"{stem}.weight", zero)
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    before = manifest_if_readable(options.tuned)
    total = sum(matrix.norm**2 for matrix in found.matrices)
    kept = sum(matrix.norm**2 * matrix.retained for matrix in found.matrices)
    report = ExtractReport(str(options.output), options.r, modules, kept / total, found.matrices, found.left_out)
    with build_directory(options.output, "adapter", inputs, options.overwrite) as staging:
        template = before.template if before is not None else None
        write_adapter(staging, Adapter(spec, tensors, base_fingerprint, template, str(options.base)))
        staging.facts["report"] = asdict(report)
    found.tell()
    if other:
        what = f"the models also differ in {' and '.join(other)}, which an adapter cannot hold"
        on_event(Notice(f"{tuned.path}: {what}", "warning"))
    return report


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1]


def _target_modules(options: ExtractOptions) -> tuple[str, ...]:
    if options.target_modules is None or options.target_modules == "all-linear":
        return LINEAR_MODULES
    names = tuple(dict.fromkeys(name.strip() for name in options.target_modules.split(",")))
    unknown = [name for name in names if name not in LINEAR_MODULES]
    if unknown:
        todo = f"there are {', '.join(LINEAR_MODULES)}"
        raise SpecError(f"no linear layer called {unknown[0]!r}", "--target-modules", todo)
    return names


def _refuse_other_shapes(base: Checkpoint, tuned: Checkpoint) -> None:
    other = {
        name for name in base.shapes.keys() | tuned.shapes.keys() if base.shapes.get(name) != tuned.shapes.get(name)
    }
    if other:
        name = min(other)
        shapes = " and ".join(str(list(c.shapes[name])) if name in c.shapes else "absent" for c in (base, tuned))
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise CheckpointError(
            f"two shapes of model: {name} is {shapes}{more}", tuned.path, "give the base it came from"
        )


def _computed_otherwise(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """What differs in the configurations of two models of one shape and decides what they compute.

    Raises:
        CheckpointError: rows and columns of one mean something else in the other.
    """
    differing = {
        name: f"{name} ({getattr(base.config, name)!r} and {getattr(tuned.config, name)!r})"
        for name in (*_LAYOUT, *_SETTINGS)
        if getattr(base.config, name) != getattr(tuned.config, name)
    }
    for name in _LAYOUT:
        if name in differing:
            raise CheckpointError(f"they differ in {differing[name]}", tuned.path, "give the base it came from")
    return list(differing.values())


@dataclass
class _Differences:
    """The difference of two models, tensor by tensor: updates A (r, in) and B (out, r), and what is left out."""

    base: Checkpoint
    tuned: Checkpoint
    r: int
    modules: tuple[str, ...]
    on_event: OnEvent
    should_stop: ShouldStop
    updates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    matrices: list[ExtractedMatrix] = field(default_factory=list)
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)

    @torch.no_grad()
    def compute(self) -> None:
        for done, name in enumerate(self.base.shapes, 1):
            if self.should_stop():
                raise Stopped("stopped while extracting", self.tuned.path, "run the same command again")
            before, after = self.base.tensor(name, mapped=True), self.tuned.tensor(name, mapped=True)
            if before.dtype != after.dtype or not torch.equal(before, after):
                self._take(name, before.float(), after.float())
            self.on_event(Progress("extracting", done, len(self.base.shapes)))

    def _take(self, name: str, before: Tensor, after: Tensor) -> None:
        difference = after - before
        norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        if not norm < float("inf"):
            raise CheckpointError(f"{name} holds NaN or infinity, in one of the two", self.tuned.path, "fetch it again")
        if norm == 0:
            return
        parts = name.split(".")
        if parts[-1] != "weight" or parts[-2] not in self.modules:
            self.left_out[name] = norm, float(torch.linalg.vector_norm(before, dtype=torch.float64))
            return
        U, S, Vh, method = decomposed(difference, self.r)
        rank = len(S)
        A, B = torch.zeros(self.r, difference.shape[1]), torch.zeros(difference.shape[0], self.r)
        A[:rank] = S.sqrt()[:, None] * Vh
        B[:, :rank] = U * S.sqrt()
        self.updates[name] = A, B
        held = (S.double().square().cumsum(0) / norm**2).clamp(max=1.0)
        ranks = [*(1 << power for power in range(17) if 1 << power < self.r), self.r]
        energy = {count: float(held[min(count, rank) - 1]) for count in ranks}
        self.matrices.append(ExtractedMatrix(name, norm, method, energy))

    def tell(self) -> None:
        """A notice of what differs and is not in the adapter, the largest first."""
        if not self.left_out:
            return
        names = sorted(self.left_out, key=lambda name: -self.left_out[name][0])
        shown = ", ".join(f"{name} ({self._relative(name):.2%} of its norm)" for name in names[:_LISTED])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        what = f"these differ too and are not in the adapter: {shown}{more}"
        self.on_event(Notice(f"{self.tuned.path}: {what}", "warning"))

    def _relative(self, name: str) -> float:
        changed, size = self.left_out[name]
        return changed / size if size else 1.0


def decomposed(D: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Literal["full", "randomised"]]:
    """The r largest singular values of a matrix (out, in), with U (out, r) and Vh (r, in), and how they were found.

    Subspace iteration gives the exact ones up to a difference of rank ``r + _SPARE_DIRECTIONS``, else values below
    them by a little; what U and Vh hold of the matrix is S, in either case.
    """
    smaller, sampled = min(D.shape), r + _SPARE_DIRECTIONS
    if smaller <= max(_LARGEST_FULL, 2 * sampled):
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r], "full"
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(D @ torch.randn(D.shape[1], sampled, generator=generator)).Q
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(D @ torch.linalg.qr(D.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ D, full_matrices=False)
    return Q @ U[:, :r], S[:r], Vh[:r], "randomised"


def _stored_report(facts: dict[str, Any], options: ExtractOptions) -> ExtractReport:
    try:
        stored = {entry.name: facts["report"][entry.name] for entry in fields(ExtractReport)}
        matrices = [
            ExtractedMatrix(**{**matrix, "energy": {int(rank): held for rank, held in matrix["energy"].items()}})
            for matrix in stored["matrices"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        where = options.output / MANIFEST
        raise CheckpointError("its manifest holds no report", where, "choose another output") from None
    report = ExtractReport(**{**stored, "matrices": matrices})
    return dataclasses.replace(report, output=str(options.output), already_done=True)

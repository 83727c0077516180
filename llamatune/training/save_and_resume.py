"""Saving and resuming a run: its checkpoints, and the trained adapter or model in best/ and at the end."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llamatune import __version__
from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter, write_adapter
from llamatune.checkpoints.companion_files import RunCompanions
from llamatune.checkpoints.huggingface_weights import write_huggingface
from llamatune.checkpoints.model_card import write_card
from llamatune.checkpoints.sharded_checkpoint import save_sharded_state
from llamatune.checkpoints.tensor_bytes import write_tensors
from llamatune.checkpoints.training_checkpoint import WEIGHTS, newest_run_state, read_run_state, save_run_state
from llamatune.devices import gpu_facts
from llamatune.errors import CheckpointError
from llamatune.events import EpochDone, EpochMeans, EvalDone, ignore_event
from llamatune.formats.manifest import Staging, build_directory
from llamatune.formats.metrics import KEPT_EPOCHS, Logged, Record, logged_at, loss_at_start
from llamatune.formats.safetensors import read_header
from llamatune.formats.state_json import STATE, SavedState, checkpoint_path
from llamatune.formats.summary_json import write_summary
from llamatune.model.adapters.apply import adapter_parameters, restored_tensors, stored_tensors
from llamatune.model.kernels.choice import kernels_in_use
from llamatune.ranks import Ranks
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.spec import RunSpec
from llamatune.strict_json import write_json
from llamatune.training.gpu_meter import GpuMeter
from llamatune.training.input_digests import InputDigests
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.run_card import run_card
from llamatune.training.run_directory import RunDirectory
from llamatune.training.run_file_names import ADAPTER, BEST, CHECKPOINTS, METRICS, MODEL, SUMMARY
from llamatune.training.sharded_tensors import owned_runs, restore_runs
from llamatune.training.trainer_state import TrainerState

EVALUATION = "evaluation.json"
"""In ``best/``: step, epoch, loss, perplexity, rows and target tokens of the evaluation of these weights."""
_LOSSES = {"training": "train_loss", "validation": "validation_loss"}
"""Of an epoch."""


@dataclass(frozen=True)
class RunOutput:
    """Writes what a run makes into its directory, and restores the learner from there.

    The first rank writes. The others wait until it has, however long that takes: none goes on before a checkpoint is
    durable, nor into a window in which the first would seem to have vanished.
    """

    spec: RunSpec
    inputs: Inputs
    learner: Learner
    run: RunDirectory
    ranks: Ranks
    gpu_meter: GpuMeter
    input_digests: InputDigests
    companions: RunCompanions
    epochs: deque[EpochMeans] = field(default_factory=lambda: deque(maxlen=KEPT_EPOCHS))
    """The last ones that are closed."""
    losses_before: array[float] = field(default_factory=lambda: array("d"))
    """Of the updates before this process, on the first rank."""

    def log(self, record: Record) -> None:
        """Append a line to ``metrics.jsonl``."""
        if isinstance(record, EpochMeans):
            self.epochs.append(record.means() if isinstance(record, EpochDone) else record)
        if self.run.log is not None:
            self.run.log.append(record)

    def log_durably(self, record: Record) -> None:
        """Append a line that no checkpoint will sync."""
        if self.run.log is not None:
            self.run.log.append(record)
            self.run.log.sync()

    def loss_at_start(self) -> float | None:
        """The validation loss before the first step, also where another process computed it; None: it was not."""
        return self.ranks.from_first(loss_at_start(self.run.path / METRICS) if self.ranks.is_first else None)

    def cut_log(self, length: int) -> None:
        if self.run.log is not None:
            self.run.log.cut(length)

    def resume_log(self, saved: SavedState) -> None:
        """Cut the log to what a checkpoint knew, which must be what the log says; take its epochs from there.

        Versions that kept epochs in ``state.json`` logged none: they are logged now.
        """
        logged = Logged() if self.run.log is None else logged_at(self.run.log.path, saved)
        self.cut_log(saved.metrics_bytes)
        self.losses_before.extend(logged.losses)
        shared = self.ranks.from_first([asdict(epoch) for epoch in logged.epochs])
        self.epochs.extend(EpochMeans(**values) for values in shared)
        for epoch in saved.position.epochs:
            self.log(EpochMeans(**dict(epoch)))

    def save_checkpoint(self, progress: TrainerState) -> Path:
        """Write ``checkpoints/step-000100`` durably, after the metrics log; its path."""
        path = checkpoint_path(self.run.path / CHECKPOINTS, progress.step)
        gpu_use = self.gpu_meter.state(self.ranks)
        if self.run.log is not None or self.learner.sharded is not None:
            self._write_checkpoint(path, progress, 0 if self.run.log is None else self.run.log.sync(), gpu_use)
        self.ranks.wait()
        return path

    def _write_checkpoint(
        self, path: Path, progress: TrainerState, metrics_bytes: int, gpu_use: dict[str, Any] | None
    ) -> None:
        base_files = self.input_digests.state()
        state = SavedState.model_validate({
            "step": progress.step,
            "position": asdict(progress),
            "scaler": self.learner.scaler.state(),
            "metrics_bytes": metrics_bytes,
            "llamatune": __version__,
            **_machine(self.learner.device),
            **({} if gpu_use is None else {"gpu_use": gpu_use}),
            **({} if base_files is None else {"base_files": base_files}),
        })  # fmt: skip
        if self.learner.sharded is not None:
            save_sharded_state(path, owned_runs(self.learner), state, self.ranks)
            return
        save_run_state(path, self.write_weights, self.learner.optimizer.state_tensors(), state)

    def load_checkpoint(self, warn: Callable[[str], None]) -> tuple[Path, TrainerState, SavedState] | None:
        """Restore the newest checkpoint that verifies: its path, the progress, and all that ``state.json`` says.

        None: there is no checkpoint.
        """
        in_ranges, directory = self.learner.sharded is not None, self.run.path / CHECKPOINTS
        checkpoint = newest_run_state(directory, warn, in_ranges) if self.ranks.is_first else None
        path = self.ranks.from_first(None if checkpoint is None else str(checkpoint.path))
        if path is None:
            return None
        checkpoint = checkpoint or read_run_state(Path(path), in_ranges, verified=in_ranges)
        state, scaler = checkpoint.progress, self.learner.scaler
        if (state.scaler.scale is not None) != scaler.enabled and "training.precision" not in self.run.changed_fields:
            found = "missing" if scaler.enabled else "there"
            what = f"scaler is {found}, with training.precision: {self.spec.training.precision}"
            raise CheckpointError(what, checkpoint.path / STATE, "was it edited? remove this checkpoint")
        if checkpoint.stored is not None:
            restore_runs(self.learner, checkpoint.stored)
        else:
            self._restore_weights(checkpoint.path)
            self.learner.optimizer.restore(checkpoint.optimizer, checkpoint.path)
        scaler.restore(state.scaler)
        self.gpu_meter.restore(None if state.gpu_use is None else state.gpu_use.model_dump())
        self.input_digests.restore(state.recorded_base, checkpoint.path)
        if changed := _changes(state.model_dump(exclude_unset=True), _machine(self.learner.device)):
            warn(f"not bit-exact on another machine than before: {', '.join(changed)}")
        return checkpoint.path, TrainerState.restored(state.position), state

    def write_best(self, evaluation: EvalDone) -> None:
        """Replace ``best/`` by the current weights, with their ``evaluation`` in ``evaluation.json``."""
        values = asdict(evaluation)
        del values["best"], values["seconds"]  # what is written is a function of the run alone
        if self.ranks.is_first:
            losses = {"step": evaluation.step, "validation loss": f"{evaluation.loss:.4f}, the lowest of the run"}
            with build_directory(self.run.path / BEST, self._kind, {}, overwrite=True) as staging:
                self._write_product(staging)
                self._write_companions(staging, self.run.path / BEST, losses)
                write_json(staging.path / EVALUATION, values)
        elif self.learner.sharded is not None:
            self.learner.sharded.serve()
        self.ranks.wait()

    def write_final(self, progress: TrainerState) -> None:
        """Write ``adapter/`` or ``model/``; the log is durable before."""
        if self.run.log is not None:
            self.run.log.sync()  # the last epoch was closed after the last checkpoint
        if self.ranks.is_first:
            last = self.epochs[-1] if self.epochs else None
            losses = {f"{name} loss": getattr(last, key, None) for name, key in _LOSSES.items()}
            shown = {name: f"{loss:.4f}, in the last epoch" for name, loss in losses.items() if loss is not None}
            final = self.run.path / self._kind
            with build_directory(final, self._kind, {}, overwrite=True) as staging:
                self._write_product(staging)
                self._write_companions(staging, final, {"step": progress.step, **shown})
        elif self.learner.sharded is not None:
            self.learner.sharded.serve()
        self.ranks.wait()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, which says that the run is finished."""
        if self.ranks.is_first:
            write_summary(self.run.path / SUMMARY, summary)
        self.ranks.wait()

    def write_weights(self, staging: Staging) -> None:
        """Write the trained tensors, bit for bit, into a checkpoint's staging directory.

        A checkpoint of an adapter is a PEFT directory too: ``generate`` and ``merge-lora`` take it.
        """
        if self.spec.adapter is None:
            write_tensors(staging, WEIGHTS, self.learner.parameters)
        else:
            self._write_product(staging)

    @torch.no_grad()
    def _restore_weights(self, checkpoint: Path) -> None:
        adapter, parameters = self.spec.adapter, self.learner.parameters
        if adapter is None:
            read_header(checkpoint / WEIGHTS)  # which names what is broken
            tensors: Mapping[str, torch.Tensor] = load_file(checkpoint / WEIGHTS)
        else:
            stored = load_adapter(checkpoint)
            check_adapter(stored, self.inputs.config)
            whole = {name: one.value for name, one in stored.base_changes.items() if one.value is not None}
            tensors = restored_tensors(adapter, {**stored.tensors, **whole})
            parameters = dict(adapter_parameters(self.learner.model))
        trained, found = (
            {name: (one.shape, one.dtype) for name, one in group.items()} for group in (parameters, tensors)
        )
        if trained != found:
            other = next(name for name in {**trained, **found} if trained.get(name) != found.get(name))
            raise CheckpointError(f"{other} is not as this run trains it", checkpoint, "remove this checkpoint")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    @property
    def _kind(self) -> str:
        return MODEL if self.spec.adapter is None else ADAPTER

    def _write_product(self, staging: Staging) -> None:
        spec, inputs, parameters = self.spec, self.inputs, self.learner.parameters
        base, template, fingerprint = spec.model.path, inputs.prepared.manifest.template, inputs.base_fingerprint
        if spec.adapter is None:
            sharded, source = self.learner.sharded, Path(base)
            tensor_of = parameters.__getitem__ if sharded is None else sharded.whole_tensors()
            write_huggingface(staging, inputs.config, tensor_of, lambda name: torch.float32, source, ignore_event)
            staging.facts["template"] = template
        else:
            tensors = stored_tensors(spec.adapter, dict(adapter_parameters(self.learner.model)))
            quantized = spec.model.dtype if spec.model.dtype in QUANTIZED_DTYPES else None
            named = self.companions.peft_base
            adapter = Adapter(spec.adapter.stored(), tensors, fingerprint, template, named, base_dtype=quantized)
            write_adapter(staging, adapter)
            staging.facts["base_path"] = base

    def _write_companions(self, staging: Staging, final: Path, results: Mapping[str, Any]) -> None:
        """What the product carries for its readers; a checkpoint, which is for resuming, goes without."""
        if self.spec.adapter is None:
            self.companions.complete_model(staging.path)
        else:
            self.companions.write(staging, final)
        write_card(staging.path, run_card(self.spec, self.inputs, self.companions.peft_base, results))


def _machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on beside the spec: sums in another order, by other instructions, give other bits."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "gpu": gpu_facts(device),
        "kernels": kernels_in_use(),
    }


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What was other ``before``, in words. What was not recorded, or of a GPU is not known, is taken for unchanged."""
    changes = []
    for name, value in now.items():
        was = before.get(name, value)
        if isinstance(was, dict) and isinstance(value, dict):
            changes += _changes(was, value, f"{name} ")
        elif was != value and not (prefix and None in (was, value)):
            changes.append(f"{prefix}{name} was {was.get('name') if isinstance(was, dict) else was or 'none'}")
    return changes

"""Stopped or killed anywhere, a run that is started again ends in the same bytes."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run_tools
import torch
from run_tools import Crash, StopAfter, assert_same_outcome, crash_at, files, make_spec, metrics, run_and_record
from safetensors.torch import load_file

from llamatune.checkpoints import training_checkpoint
from llamatune.errors import CheckpointError, EnvironmentFault, Stopped
from llamatune.events import Event, Notice, RunStarted, StepDone
from llamatune.formats import manifest as manifests
from llamatune.formats.manifest import MANIFEST
from llamatune.safe_reading import digest_file
from llamatune.spec import RunSpec
from llamatune.training import loop, model_and_optimizer, save_and_resume
from llamatune.training.precision import LossScaler
from llamatune.training.train import train

SCHEDULED = {"training__lr_scheduler": "cosine", "training__warmup_steps": 2, "training__max_grad_norm": 0.4}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw, epochs, validation": {**SCHEDULED, "training__num_epochs": 2, "training__weight_decay": 0.1},
    "sgd with momentum, max_steps inside an epoch": {
        **SCHEDULED, "training__optimizer": "sgd", "training__momentum": 0.8, "training__max_steps": 7,
    },
    "saves and evaluates at odd steps": {
        "training__max_steps": 6, "training__save_every_steps": 4, "training__keep_last": 1,
        "evaluation__every_steps": 3,
    },
    "fp16 with overflows": {"training__num_epochs": 5, "training__precision": "fp16"},
    "packed": {
        **SCHEDULED, "training__num_epochs": 2, "data__packing": True, "data__packed_tokens": 40,
        "training__gradient_accumulation_steps": 1,
    },
    "stops early": {
        "training__num_epochs": 9, "training__learning_rate": 1.0, "evaluation__early_stopping_patience": 2,
        "evaluation__every_steps": 1, "evaluation__early_stopping_min_delta": 0.01,
    },
    "every parameter, recomputed": {
        "lora": None, "training__max_steps": 5, "training__learning_rate": 1e-3,
        "training__activation_checkpointing": "block", "evaluation__every_steps": 2,
    },
    "nf4 base in bf16, 8-bit adamw": {
        **SCHEDULED, "model__dtype": "nf4", "training__precision": "bf16", "training__optimizer": "adamw_8bit",
        "training__max_steps": 5, "lora": {"r": 64, "alpha": 64, "dropout": 0.1, "target_modules": "all-linear"},
    },
    "dora, 8-bit adamw": {
        **SCHEDULED, "training__max_steps": 3, "training__optimizer": "adamw_8bit",
        "lora": {"kind": "dora", "r": 4, "dropout": 0.1, "target_modules": "all-linear"},
    },
    "pissa on nf4, lora+": {
        **SCHEDULED, "training__max_steps": 3, "model__dtype": "nf4", "training__precision": "bf16",
        "lora": {"init": "pissa", "r": 4, "ranks": {"v_proj": 3}, "lr_ratio": 4.0},
    },
    "lora_fa from gaussian": {
        **SCHEDULED, "training__max_steps": 3, "lora": {"kind": "lora_fa", "init": "gaussian", "r": 4},
    },
    "embedding, head and norm whole, 8-bit adamw": {
        **SCHEDULED, "training__max_steps": 3, "training__optimizer": "adamw_8bit", "training__weight_decay": 0.1,
        "model__dtype": "bfloat16", "training__precision": "bf16",
        "lora": {"r": 4, "dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    },
    "float8 base in bf16": {
        **SCHEDULED, "model__dtype": "float8", "training__precision": "bf16", "training__max_steps": 5,
    },
}  # fmt: skip


QWEN: dict[str, Any] = {"model_type": "qwen3", "attention_bias": True, "head_dim": 10}


@pytest.fixture
def run_of(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunSpec]:
    """A spec for a named variant; 18 rows in windows of 5 make a partial last window, 5 rows are held out."""
    monkeypatch.setattr(model_and_optimizer, "LossScaler", lambda enabled: LossScaler(enabled, 2.0**26, 3))

    def make(name: str, variant: str) -> RunSpec:
        changes = {
            "training__micro_batch_size": 2, "training__gradient_accumulation_steps": 3,
            **VARIANTS.get(variant, VARIANTS["every parameter, recomputed"]),
        }  # fmt: skip
        base = tiny_base(**({} if variant in VARIANTS else QWEN))
        return make_spec(base, prepared(validation_fraction=0.25, seed=3), tmp_path / name, **changes)

    return make


def _finish(spec: RunSpec, stops: Iterator[int]) -> int:
    """Start the run again until it is done; how often that was."""
    for attempt in itertools.count(1):
        stop = StopAfter(next(stops))
        try:
            train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
            return attempt
        except Stopped:
            assert attempt < 200
    raise AssertionError


@pytest.mark.parametrize("variant", [*VARIANTS, "every parameter, biases and norms of heads"])
def test_stopped_again_and_again_gives_the_bytes_of_one_go(run_of: Callable[..., RunSpec], variant: str) -> None:
    whole, parts = run_of("whole", variant), run_of("parts", variant)
    train(whole)
    assert _finish(parts, itertools.cycle([1, 2, 1, 5, 3, 4])) > 2
    assert_same_outcome(Path(parts.training.output_dir), Path(whole.training.output_dir))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_any_event_gives_the_bytes_of_one_go(run_of: Callable[..., RunSpec], variant: str) -> None:
    """The process dies at its n-th report, for every n (windows, validation batches, saves, ends of epochs)."""
    whole = run_of("whole", variant)
    _, events = run_and_record(whole)
    first = next(i for i, event in enumerate(events) if isinstance(event, RunStarted))
    places = range(first, len(events), 1 if variant.startswith("saves") else 7)
    for place in places:
        spec = run_of(f"killed-{place}", variant)
        with pytest.raises(Crash):
            train(spec, on_event=crash_at(place))
        train(spec)
        assert_same_outcome(Path(spec.training.output_dir), Path(whole.training.output_dir))


def test_the_variants_do_what_their_names_say(run_of: Callable[..., RunSpec]) -> None:
    """Without overflows, early stops and partial windows the tests above would prove little."""
    runs = {name: run_of(name.replace(",", ""), name) for name in ("fp16 with overflows", "stops early")}
    summaries = {name: train(spec) for name, spec in runs.items()}
    scales = {line["loss_scale"] for line in metrics(Path(runs["fp16 with overflows"].training.output_dir))
              if line["event"] in ("step", "skipped")}  # fmt: skip
    assert summaries["fp16 with overflows"]["skipped_windows"] >= 1
    assert summaries["fp16 with overflows"]["steps"] >= 3
    assert len(scales) > 2, "the scale never moved"
    assert summaries["stops early"]["stopped_early"]
    assert summaries["stops early"]["steps"] > summaries["stops early"]["best_step"]


def test_a_stop_between_windows_saves_and_tells_where(run_of: Callable[..., RunSpec]) -> None:
    spec = run_of("run", "adamw, epochs, validation")
    stop = StopAfter(2)
    with pytest.raises(Stopped, match="run the same command again") as raised:
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    assert raised.value.exit_code == 75
    run = Path(spec.training.output_dir)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()
    _, events = run_and_record(spec)
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.resumed_step == 2


@pytest.mark.parametrize(
    "victim", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "llamatune.json"]
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_notice(run_of: Callable[..., RunSpec], victim: str) -> None:
    whole, parts = (
        run_of("whole", "saves and evaluates at odd steps"),
        run_of("parts", "saves and evaluates at odd steps"),
    )
    train(whole)
    parts = parts.model_copy(update={"training": parts.training.model_copy(update={"keep_last": 3})})
    for count in (2, 2):
        stop = StopAfter(count)
        with pytest.raises(Stopped):
            train(parts, on_event=stop.on_event, should_stop=stop.should_stop)
    run = Path(parts.training.output_dir)
    assert len(list((run / "checkpoints").iterdir())) == 2
    damaged = run_tools.last_checkpoint(run) / victim
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 0x10
    damaged.write_bytes(content)
    _, events = run_and_record(parts)
    notices = [event.message for event in events if isinstance(event, Notice) and event.kind == "warning"]
    assert len([line for line in notices if str(damaged.parent) in line and "skipped" in line]) == 1
    assert next(event for event in events if isinstance(event, RunStarted)).resumed_step == 2
    assert_same_outcome(run, Path(whole.training.output_dir))


def _stopped_after(spec: RunSpec, *counts: int) -> Path:
    for count in counts:
        stop = StopAfter(count)
        with pytest.raises(Stopped):
            train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    return Path(spec.training.output_dir)


def test_the_newest_checkpoint_is_that_of_the_last_step_whatever_the_clock_says(run_of: Callable[..., RunSpec]) -> None:
    run = _stopped_after(run_of("run", "adamw, epochs, validation"), 2, 1)
    for age, path in enumerate(sorted((run / "checkpoints").iterdir())):
        os.utime(path, (age * -1000, age * -1000))
    _, events = run_and_record(run_of("run", "adamw, epochs, validation"))
    assert next(event for event in events if isinstance(event, RunStarted)).resumed_step == 3


def test_a_checkpoint_of_another_version_is_refused_and_not_thrown_away(run_of: Callable[..., RunSpec]) -> None:
    """A damaged one may be trained again; one that only another version understands is worth a question."""
    spec = run_of("run", "adamw, epochs, validation")
    run = _stopped_after(spec, 2)
    checkpoint = run_tools.last_checkpoint(run)
    state, manifest = checkpoint / "state.json", checkpoint / MANIFEST
    state.write_text(json.dumps({**json.loads(state.read_text()), "schema": 99}))
    told = json.loads(manifest.read_text())
    told["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": digest_file(state)}
    for schema in (1, 99):
        manifest.write_text(json.dumps({**told, "schema": schema}))
        before = files(run)
        with pytest.raises(CheckpointError, match="another version \\(schema 99\\)"):
            train(spec)
        assert {name: files(run)[name] for name in before} == before


def test_a_checkpoint_that_cannot_be_read_is_no_reason_to_start_over(
    run_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless an older one can be read; what is damaged is passed over, what a disk does not give now may come back."""
    spec = run_of("run", "adamw, epochs, validation")
    run = _stopped_after(spec, 2, 1)
    opened = manifests.open_regular

    def failing(path: Path) -> Any:
        if path.is_relative_to(run / "checkpoints" / "step-000003") or not older:
            raise EnvironmentFault("cannot read: Input/output error", path)
        return opened(path)

    monkeypatch.setattr(manifests, "open_regular", failing)
    older = False
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        train(spec)
    older = True
    _, events = run_and_record(spec)
    assert next(event for event in events if isinstance(event, RunStarted)).resumed_step == 2


def test_a_resumed_run_reads_its_state_once_and_onto_the_cpu(
    run_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More memory than training itself needs would end a run for good where it barely fitted."""
    spec = run_of("run", "every parameter, recomputed")
    _stopped_after(spec, 2)
    read: list[str] = []

    def counting(path: Path, *more: Any) -> dict[str, torch.Tensor]:
        tensors = load_file(path, *more)
        assert all(tensor.device.type == "cpu" for tensor in tensors.values())
        read.append(path.name)
        return tensors

    for module in (training_checkpoint, save_and_resume):
        monkeypatch.setattr(module, "load_file", counting)
    train(spec)
    assert sorted(read) == ["optimizer.safetensors", "weights.safetensors"]


def test_another_processor_or_thread_count_is_remarked_upon(
    run_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_of("run", "adamw, epochs, validation")
    _stopped_after(spec, 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    _, events = run_and_record(spec)
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("not bit-exact" in line and "cpu was" in line and "threads" not in line for line in notices)


def test_memory_that_ends_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    run_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, spec = (run_of(name, "saves and evaluates at odd steps") for name in ("whole", "run"))
    train(whole)
    update = loop.make_update

    def update_until_memory_ends(learner: Any, *more: Any) -> Any:
        if next(steps) == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return update(learner, *more)

    steps = itertools.count()
    monkeypatch.setattr(loop, "make_update", update_until_memory_ends)
    with pytest.raises(EnvironmentFault, match="out of memory") as raised:
        train(spec)
    assert raised.value.exit_code == 5
    _, events = run_and_record(spec)
    assert next(event for event in events if isinstance(event, RunStarted)).resumed_step == 4
    assert_same_outcome(Path(spec.training.output_dir), Path(whole.training.output_dir))


def test_a_slow_save_is_remarked_upon(run_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler kills soon after its signal."""
    monkeypatch.setattr(loop, "_SLOW_SAVE_S", -1.0)
    _, events = run_and_record(run_of("run", "saves and evaluates at odd steps"))
    assert any(isinstance(event, Notice) and "saving took" in event.message for event in events)


def test_a_finished_run_is_left_as_it_is(run_of: Callable[..., RunSpec]) -> None:
    spec = run_of("run", "adamw, epochs, validation")
    summary = train(spec)
    run = Path(spec.training.output_dir)
    before = files(run)
    again, events = run_and_record(spec)
    assert again == summary
    assert files(run) == before
    assert not any(isinstance(event, StepDone) for event in events)


def test_more_epochs_continue_a_finished_run(run_of: Callable[..., RunSpec]) -> None:
    """With a constant rate nothing depends on the end, so the longer run is the same as one planned so long."""
    variant = {"training__micro_batch_size": 2, "training__gradient_accumulation_steps": 3}
    VARIANTS["short"], VARIANTS["long"] = {**variant}, {**variant, "training__num_epochs": 3}
    train(run_of("grown", "short"))
    train(run_of("grown", "long"))
    train(run_of("planned", "long"))
    grown, planned = (Path(run_of(name, "long").training.output_dir) for name in ("grown", "planned"))
    assert_same_outcome(grown, planned)


def test_more_steps_continue_a_finished_run(run_of: Callable[..., RunSpec]) -> None:
    """Ended inside an epoch, continued beyond it: no end-of-run evaluation or half epoch stays behind."""
    VARIANTS["short"], VARIANTS["long"] = {"training__max_steps": 4}, {"training__max_steps": 10}
    train(run_of("grown", "short"))
    train(run_of("grown", "long"))
    train(run_of("planned", "long"))
    grown, planned = (Path(run_of(name, "long").training.output_dir) for name in ("grown", "planned"))
    assert run_tools.losses(grown) == run_tools.losses(planned)
    assert files(grown / "adapter") == files(planned / "adapter")


def test_an_event_observer_sees_a_resumed_run_begin_where_it_was_left(run_of: Callable[..., RunSpec]) -> None:
    """Steps are reported once each over all processes together."""
    spec, seen = run_of("run", "adamw, epochs, validation"), []

    def note(event: Event) -> None:
        if isinstance(event, StepDone):
            seen.append(event.step)

    for count in (1, 3, 2, 99):
        stop = StopAfter(count)

        def observe(event: Event, stop: StopAfter = stop) -> None:
            note(event)
            stop.on_event(event)

        try:
            train(spec, on_event=observe, should_stop=stop.should_stop)
        except Stopped:
            continue
    assert seen == list(range(1, len(seen) + 1))
    assert [line["step"] for line in metrics(Path(spec.training.output_dir), "step")] == seen

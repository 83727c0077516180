"""The Python API: the core verbs as functions, which return what ``--json`` prints, raise our errors and print nothing.

Events go to a callback. Nothing heavy is loaded before a function needs it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from llamatune.command_options.option import Options, option_fields
from llamatune.command_options.outputs import check_outputs
from llamatune.errors import SpecError, Stopped
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.math_library_variables import prepare_math_libraries
from llamatune.openmp_variables import prepare_openmp
from llamatune.path_expansion import expand_path
from llamatune.python_arguments import check_arguments, plain_values
from llamatune.python_keywords import AnyPath, EvaluateKeywords, GenerateKeywords, MergeKeywords, PrepareKeywords
from llamatune.stop_signals import noting_ctrl_c
from llamatune.units import parse_size

if TYPE_CHECKING:
    from llamatune.spec import RunSpec

O = TypeVar("O", bound=Options)  # noqa: E741


@check_arguments
def load_spec(source: AnyPath | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunSpec:
    """A run spec from a YAML file, or from its sections as plain values.

    Args:
        overrides: as on the command line, ``training.seed=1``.

    Raises:
        SpecError: a key or value is wrong; all faults are reported together.
    """
    from llamatune.spec import build_spec
    from llamatune.spec import load_spec as read_spec
    from llamatune.spec_overrides import refuse_twice

    if isinstance(source, Mapping):
        refuse_twice(_texts(overrides))
        return build_spec(plain_values(source), "the spec", _texts(overrides))
    return read_spec(_path(source), _texts(overrides))


@check_arguments
def prepare(
    rows: AnyPath | Sequence[AnyPath],
    *,
    tokenizer: AnyPath,
    output: AnyPath,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    **options: Unpack[PrepareKeywords],
) -> dict[str, Any]:
    """Turn rows into token ids and loss masks: ``prepare-data``.

    Raises:
        DataError: a row cannot be used. CheckpointError: the tokenizer cannot. EnvironmentFault: the output cannot be
            written. Stopped: ``should_stop`` said so; nothing is left.
    """
    from llamatune.command_options.preparation import PrepareOptions

    request = _request(PrepareOptions, rows=_several(rows), tokenizer=tokenizer, output=output, **options)
    with _computing(should_stop) as stops:
        from llamatune.data.prepare import prepare_data

        return prepare_data(request, on_event, stops)


@check_arguments
def train(
    spec: RunSpec | AnyPath | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = True,
    overwrite: bool = False,
    force_base: bool = False,
    allow_spec_change: Sequence[str] = (),
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
) -> dict[str, Any]:
    """Train as a spec says, or continue its run; what ``summary.json`` holds.

    Raises:
        Stopped: ``should_stop`` said so. KeyboardInterrupt: Ctrl-C. A checkpoint is saved before either, and the same
            call goes on from it.
        NumericsError: the loss or a gradient is not finite. And what else the verb ends with, by its class.
    """
    from llamatune.spec import known_fields

    began_s = time.monotonic()
    changes = known_fields(_texts(allow_spec_change), "allow_spec_change")
    loaded = _spec(spec, overrides)
    with _computing(should_stop) as stops:
        from llamatune.ranks import ALONE
        from llamatune.requests import train_and_track

        return train_and_track(loaded, resume, overwrite, force_base, changes, on_event, stops, ALONE, began_s)


@check_arguments
def generate(
    model: AnyPath,
    prompts: str | Sequence[str] = (),
    *,
    adapter: AnyPath | Sequence[AnyPath] | None = None,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    **options: Unpack[GenerateKeywords],
) -> dict[str, Any]:
    """Complete prompts, with ``compare=True`` by the base too: ``results`` and ``tokens_per_second``.

    Raises:
        SpecError: no prompt, or options that contradict each other. DataError: a prompt cannot be used.
        CheckpointError: the model or an adapter cannot. Stopped: ``should_stop`` said so.
    """
    from llamatune.command_options.generation import GenerateOptions

    request = _request(GenerateOptions, model=model, prompt=prompts, adapter=_adapters(adapter), **options)
    with _computing(should_stop) as stops:
        from llamatune.inference.prompt_files import given_prompts
        from llamatune.ranks import ALONE
        from llamatune.requests import complete_prompts

        given = given_prompts(request, on_event, stops)
        if not given and request.from_data is None:
            raise SpecError("no prompt", None, "give prompts, prompt_file or from_data")
        generations = complete_prompts(request, given, on_event, stops, ALONE)
    return {"results": generations.lines, "tokens_per_second": generations.tokens_per_second}


@check_arguments
def evaluate(
    model: AnyPath,
    data: AnyPath,
    *,
    adapter: AnyPath | Sequence[AnyPath] | None = None,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    **options: Unpack[EvaluateKeywords],
) -> dict[str, Any]:
    """Loss, perplexity and token accuracy on prepared rows, or with ``task="gsm8k"`` the accuracy of answers.

    Raises:
        DataError: the data cannot be used. CheckpointError: the model or an adapter cannot.
        NumericsError: a loss is not finite. Stopped: ``should_stop`` said so.
    """
    from llamatune.command_options.inference import EvaluateOptions

    request = _request(EvaluateOptions, model=model, data=data, adapter=_adapters(adapter), **options)
    with _computing(should_stop) as stops:
        from llamatune.ranks import ALONE
        from llamatune.requests import evaluate_model

        return evaluate_model(request, on_event, stops, ALONE)


@check_arguments
def merge(
    model: AnyPath,
    adapter: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    **options: Unpack[MergeKeywords],
) -> dict[str, Any]:
    """Write the model with adapters folded into it: ``merge-lora``.

    Raises:
        CheckpointError: an adapter does not belong to the model. EnvironmentFault: the output cannot be written.
            Stopped: ``should_stop`` said so; nothing is left.
    """
    from llamatune.command_options.inference import MergeOptions

    request = _request(MergeOptions, model=model, adapter=_adapters(adapter), output=output, **options)
    with _computing(should_stop) as stops:
        from llamatune.merge_proof import merge_and_prove

        return asdict(merge_and_prove(request, on_event, stops))


@check_arguments
def plan_memory(
    spec: RunSpec | AnyPath | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    memory: str | int | None = None,
    device: str | None = None,
    ranks: int = 1,
    max_seq_length: int | None = None,
    explain: bool = False,
    on_event: OnEvent = ignore_event,
) -> dict[str, Any]:
    """Predict the peak memory of a run: ``plan-memory``. Neither weights nor torch are loaded.

    Args:
        memory: of the device, as ``24GiB`` or in bytes; of it 90 % are planned with. None: of a CPU what is free here.
        device: ``cuda`` or ``cpu``, where other attention kernels run; None: that of the spec, or ``cuda``.
        max_seq_length: tokens of every row, in place of the prepared data's.
    """
    from llamatune.checkpoints.model_directory import read_config
    from llamatune.command_options.memory import PlanMemoryOptions
    from llamatune.requests import plan_of_training

    size = parse_size(memory, "memory") if isinstance(memory, str) else memory
    if size is not None and size < 1:
        raise SpecError(f"{size} is no size", "memory", "give a number from 1 on, or a text such as 24GiB")
    checked = _request(PlanMemoryOptions, device=device, ranks=ranks, max_seq_length=max_seq_length, explain=explain)
    loaded = _spec(spec, overrides)
    return plan_of_training(
        loaded,
        read_config(Path(loaded.model.path), on_event, loaded.model.variant),
        memory_bytes=size,
        device=checked.device,
        ranks=checked.ranks,
        row_tokens=checked.max_seq_length,
        explain=checked.explain,
        on_event=on_event,
    )


def _spec(spec: RunSpec | AnyPath | Mapping[str, Any], overrides: Sequence[str]) -> RunSpec:
    from llamatune.spec import RunSpec as Spec

    if isinstance(spec, Spec):
        return load_spec(spec.model_dump(mode="json", exclude_unset=True), overrides) if overrides else spec
    return load_spec(spec, overrides)


def _texts(texts: str | Sequence[str]) -> list[str]:
    """One text is a sequence of its letters too, for Python and for type checkers, but never meant so."""
    return [texts] if isinstance(texts, str) else list(texts)


def _several(paths: AnyPath | Sequence[AnyPath]) -> list[AnyPath]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _adapters(adapter: AnyPath | Sequence[AnyPath] | None) -> list[AnyPath] | None:
    return None if adapter is None else _several(adapter)


def _path(path: AnyPath) -> Path:
    return Path(expand_path(os.fspath(path)))


def _request(options: type[O], **values: Any) -> O:
    """The options of a verb, paths expanded as on the command line; what it would write is checked as there."""
    for declared in option_fields(options):
        value = values.get(declared.name)
        if declared.kind is Path and value is not None:
            values[declared.name] = _path(value)
        elif declared.kind == Sequence[Path] and value is not None:
            values[declared.name] = [_path(path) for path in _several(value)]
        elif declared.kind == Sequence[str] and value is not None:
            values[declared.name] = _texts(value)
    request = options(**values)
    check_outputs(request)
    return request


@contextlib.contextmanager
def _computing(should_stop: ShouldStop) -> Iterator[ShouldStop]:
    """Whether to stop, for a block that imports what computes: ``should_stop`` says so, or Ctrl-C came.

    Ctrl-C is raised when the work has ended; a second one interrupts at once. OpenMP's variables are set as on the
    command line, unless torch is loaded already, and those of oneDNN and MKL.
    """
    prepare_openmp()
    prepare_math_libraries()
    with noting_ctrl_c() as pressed:
        try:
            yield lambda: pressed() or should_stop()
        except Stopped as stop:
            if pressed():
                raise KeyboardInterrupt(str(stop)) from stop
            raise
        if pressed():
            raise KeyboardInterrupt

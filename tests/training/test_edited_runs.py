"""A run directory that was edited by hand, digests and all: each value that does not fit is named, by every reader."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_tools import last_checkpoint, make_spec, rewrite

from llamatune.errors import CheckpointError
from llamatune.formats.metrics import read_metrics
from llamatune.formats.origin_json import read_origin
from llamatune.formats.state_json import read_progress
from llamatune.formats.summary_json import read_summary
from llamatune.training.train import train

HUGE = 10**400
NUMBER = ["", "x", -1, float("nan"), float("inf"), HUGE, [], {}, True, [[[]]]]
TEXT = [-1, 1.5, True, [3], {}, float("nan")]
FLAG = ["x", 0, 1, [], {}, -1]
NESTED = ["", "x", 0, True, [1], [[[]]], float("inf")]
"""What none of a number, a text, a flag, and an object or list may be; null may stand for what was not measured."""


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path], prepared: Callable[..., Path]
) -> Path:
    """A finished run that wrote every kind of value: fp16 with a scaler, evaluations, an early stop, changed fields."""
    output = tmp_path_factory.mktemp("edited") / "run"
    changes: dict[str, Any] = {
        "training__precision": "fp16", "training__num_epochs": 4,
        "training__save_every_steps": 2, "training__log_layer_grad_norms": True, "evaluation__every_steps": 1,
        "evaluation__early_stopping_patience": 1, "evaluation__early_stopping_min_delta": 100.0,
    }  # fmt: skip
    data = prepared(validation_fraction=0.25, seed=3)
    assert train(make_spec(tiny_base(), data, output, **changes))["stopped_early"]
    patient = {**changes, "evaluation__early_stopping_patience": 4}
    assert train(make_spec(tiny_base(), data, output, **patient))["stopped_early"]
    return output


@pytest.fixture
def edited(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def places(values: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value inside of ``values`` with its keys; of a list the first alone."""
    inner = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*keys, key), value
        yield from places(value, (*keys, key))


def wrong_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return FLAG
    if isinstance(value, int | float):
        return NUMBER
    return TEXT if isinstance(value, str) else NESTED


def changed(values: Any, keys: tuple[Any, ...], value: Any) -> Any:
    edited = copy.deepcopy(values)
    inner = edited
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return edited


def sweep(values: Any, read: Callable[[str], object], name: str) -> int:
    """Each value replaced by each that it cannot be, a key added to each object: all are refused, and named."""
    tried = 0
    for keys, value in places(values):
        if "old" in keys or "new" in keys:  # of a change of the spec: any value of JSON
            continue
        key = next(str(key) for key in reversed(keys) if isinstance(key, str))
        news = [(keys, new) for new in wrong_values(value) if value is not None]
        if isinstance(value, dict) and key not in ("norms", "predicted_memory_bytes", "recomputed_layers"):
            news += [((*keys, "zz"), 1)]
        for where, new in news:
            with pytest.raises(CheckpointError) as fault:
                read(json.dumps(changed(values, where, new)))
            line = str(fault.value)
            assert name in line, (where, new)
            assert "\n" not in line
            strict = isinstance(new, float) and new != 1.5  # NaN and infinity are no JSON, and have no key yet
            assert strict or key in line or "zz" in line, (where, new, line)
            tried += 1
    return tried


READERS: dict[str, Callable[[Path], object]] = {
    "summary.json": lambda run: read_summary(run / "summary.json"),
    "origin.json": lambda run: read_origin(run / "origin.json"),
    "state.json": lambda run: read_progress(last_checkpoint(run)),
}


@pytest.mark.parametrize("name", READERS)
def test_no_value_of_another_kind_is_taken(edited: Path, name: str, tell: Callable[[str], None]) -> None:
    file = (last_checkpoint(edited) if name == "state.json" else edited) / name
    values = json.loads(file.read_text())

    def read(text: str) -> object:
        file.write_text(text)
        return READERS[name](edited)

    read(json.dumps(values))
    for twice in ('{"step": 1, "step": 1}', "[]", "3", "", "{"):
        with pytest.raises(CheckpointError, match=name):
            read(twice)
    if name == "state.json":
        values.pop("schema")  # another one is another version's

        def with_schema(text: str) -> object:
            return read('{"schema": 3, ' + text[1:])

        tried = sweep(values, with_schema, name)
    else:
        tried = sweep(values, read, name)
    tell(f"{tried} edited values of {name}")
    assert tried > 50


def test_no_line_of_the_log_with_another_value_is_taken(edited: Path, tell: Callable[[str], None]) -> None:
    log = edited / "metrics.jsonl"
    lines, tried = log.read_text().splitlines(), 0
    kinds = {json.loads(line)["event"]: place for place, line in reversed([*enumerate(lines)])}
    assert kinds.keys() >= {"step", "eval", "epoch", "layer_grad_norms", "early_stop"}
    for place in kinds.values():
        before, after = "\n".join(lines[:place]), "\n".join(lines[place + 1 :])

        def read(text: str, before: str = before, after: str = after) -> object:
            later = '{"event": "later"}'  # else the line might be the last one, and torn
            log.write_text("\n".join(filter(None, (before, text, after, later))) + "\n")
            return read_metrics(log)

        values = json.loads(lines[place])
        event = values.pop("event")
        tried += sweep(values, lambda text, event=event, read=read: read(f'{{"event": "{event}", {text[1:]}'), log.name)  # type: ignore[misc]
    tell(f"{tried} edited values of {log.name}")


SUMMARIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "steps": lambda values: values.update(steps=HUGE),
    "epochs": lambda values: values.update(epochs=[3]),
    "best_step": lambda values: values.update(best_step=values["steps"] + 1),
    "early_stop": lambda values: values.update(early_stop={"message": "x"}),
    "peak_memory_bytes": lambda values: values.pop("peak_memory_bytes"),
    "trainable_parameters": lambda values: values.update(trainable_parameters=values["total_parameters"] + 1),
    "moon": lambda values: values.update(moon=1),
}


def refused_by_every_verb(
    file: Path, edit: Callable[[dict[str, Any]], object], key: str, scratch: Path, command: Callable[..., Any]
) -> None:
    """Edit a file of a run: each verb that reads it ends in one line with the file and the key."""
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))
    run, page = file.parent, scratch / "page.html"
    spec, there = run / "spec.yaml", f"training.output_dir={run}"
    for words in (("verify", run), ("report", run, "--output", page), ("train", spec, there, "--json")):
        found = command(*words)
        assert (found.code, found.stdout) == (4, ""), words
        line = found.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert key in line
        assert file.name in line


@pytest.mark.parametrize("key", SUMMARIES)
def test_every_verb_names_what_does_not_fit_in_a_summary(
    edited: Path, tmp_path: Path, command: Callable[..., Any], key: str
) -> None:
    refused_by_every_verb(edited / "summary.json", SUMMARIES[key], key, tmp_path, command)


ORIGINS: dict[str, Callable[[dict[str, Any]], object]] = {
    "base": lambda values: values.update(base=[]),
    "train": lambda values: values.update(train={"a": 1}),
    "spec_changes": lambda values: values.update(spec_changes={}),
    "passes": lambda values: values.update(passes=None),
    "lanes": lambda values: values["passes"].update(lanes=6),
}


@pytest.mark.parametrize("key", ORIGINS)
def test_every_verb_names_what_does_not_fit_in_the_origin(
    edited: Path, tmp_path: Path, command: Callable[..., Any], key: str
) -> None:
    refused_by_every_verb(edited / "origin.json", ORIGINS[key], key, tmp_path, command)


POSITIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "window": lambda state: state["position"].update(window=1 << 53),
    "skipped_windows": lambda state: state["position"].update(skipped_windows=5),
    "evaluated_step": lambda state: state["position"].update(evaluated_step=state["step"] + 1),
    "step": lambda state: state.update(step=state["step"] - 1),
    "open_epoch": lambda state: state["position"].update(open_epoch=[]),
    "growth_interval": lambda state: state["scaler"].update(growth_interval=0),
    "scaler": lambda state: state["scaler"].pop("scale"),
    "metrics_bytes": lambda state: state.update(metrics_bytes=-1),
}


@pytest.mark.parametrize("key", POSITIONS)
def test_a_state_that_does_not_fit_is_named_and_skipped(edited: Path, command: Callable[..., Any], key: str) -> None:
    """Digests fit, so only the schema can tell. A run goes on from the checkpoint before, as from a damaged one."""
    (edited / "summary.json").unlink()
    checkpoint = last_checkpoint(edited)
    rewrite(checkpoint, POSITIONS[key])
    for directory in (edited, checkpoint):
        found = command("verify", directory)
        assert (found.code, found.stdout) == (4, "")
        assert key in found.stderr.splitlines()[-1]
        assert "state.json" in found.stderr
    found = command("train", edited / "spec.yaml", f"training.output_dir={edited}")
    assert found.code == 0
    assert f"skipped {checkpoint}: " in found.stderr


def _a_step_less(state: dict[str, Any]) -> None:
    position, steps = state["position"], state["step"] - 1
    state.update(step=steps)
    position.update(step=steps, saved_step=steps, skipped_windows=position["skipped_windows"] + 1)
    position.update({key: min(steps, position[key]) for key in ("evaluated_step", "best_step")})
    position["evaluations_without_improvement"] = 0


LOGGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "step is": _a_step_less,
    "best_eval_loss is": lambda state: state["position"].update(best_eval_loss=0.25),
    "shorter": lambda state: state.update(metrics_bytes=1 << 40),
    "closed_epochs is": lambda state: state["position"].update(closed_epochs=0),
    "scaler is": lambda state: state.update(scaler={}),
}


@pytest.mark.parametrize("what", LOGGED)
def test_a_state_that_disagrees_with_the_log_or_the_spec_is_refused(
    edited: Path, command: Callable[..., Any], what: str
) -> None:
    (edited / "summary.json").unlink()
    rewrite(last_checkpoint(edited), LOGGED[what])
    found = command("train", edited / "spec.yaml", f"training.output_dir={edited}")
    assert found.code == 4
    assert what in found.stderr.splitlines()[-1]

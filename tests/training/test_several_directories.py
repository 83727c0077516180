"""A run on several prepared directories is the run on one directory of all their rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_tools import StopAfter, adapter_tensors, make_spec, metrics, spec_values

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.errors import CheckpointError, DataError, SpecError, Stopped
from llamatune.events import Event, Notice
from llamatune.reporting.run_reader import read_run
from llamatune.spec import build_spec
from llamatune.training.train import plan_training, train

WORDS = "red llama green hills nine apples cold rain seven stones".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """``a``, ``b``, ``c`` with some validation rows, ``all`` of the same rows, ``text`` rows, ``held`` ones."""
    directory, first = tmp_path_factory.mktemp("several"), 0
    files = list[Path]()
    for name, count in (("a", 7), ("b", 4), ("c", 9), ("held", 5)):
        rows = [
            {"prompt": f"{' '.join(WORDS[n % 9 :])} {n}:", "completion": f" {WORDS[n % 10]} {n}"}
            for n in range(first, first + count)
        ]
        first += count
        files.append(directory / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "text.jsonl").write_text('{"text": "green hills"}\n')

    def prepare(name: str, rows: list[Path], **options: Any) -> None:
        prepare_data(PrepareOptions(rows, tiny_tokenizer, directory / name, max_seq_length=64, **options))

    for file in (*files, directory / "text.jsonl"):
        prepare(file.stem, [file])
    prepare("all", files[:3])
    prepare("with-validation", files[1:2], validation=files[3:])
    prepare("like-a", [files[0]], template="completion", seed=3, limit=3)
    return directory


def rows_seen(run: Path) -> list[Any]:
    return [[line[key] for key in ("loss", "grad_norm", "target_tokens")] for line in metrics(run, "step")]


@pytest.mark.parametrize(
    "changes",
    [
        {"training__num_epochs": 2},
        {"data__shuffle": False},
        {"data__packing": True, "data__packed_tokens": 64, "training__gradient_accumulation_steps": 1},
    ],
    ids=["shuffled", "in order", "packed"],
)
def test_several_directories_train_as_one(
    data: Path, small_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    parts = [str(data / name) for name in "abc"]
    whole = make_spec(small_base, data / "all", tmp_path / "one", **changes)
    spec = make_spec(small_base, data / "all", tmp_path / "three", data__train=parts, **changes)
    train(whole)
    stop = StopAfter(1)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec)
    assert rows_seen(tmp_path / "one") == rows_seen(tmp_path / "three")
    ours, theirs = (adapter_tensors(tmp_path / run / "adapter") for run in ("three", "one"))
    assert ours.keys() == theirs.keys()
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())
    manifests = [json.loads((data / name / "llamatune.json").read_text()) for name in "abc"]
    origin = json.loads((tmp_path / "three" / "origin.json").read_text())
    assert len(origin["train"]) == len(set(origin["train"])) == len(manifests)
    if "training__num_epochs" in changes:
        turned = make_spec(small_base, data / "all", tmp_path / "three", data__train=parts[::-1], **changes)
        with pytest.raises(SpecError, match=r"data\.train"):
            train(turned)
        (data / "b").rename(data / "b-old")
        shutil.copytree(data / "like-a", data / "b")
        with pytest.raises(CheckpointError, match="the run was started on something else: train"):
            train(spec)
        shutil.rmtree(data / "b")
        (data / "b-old").rename(data / "b")


def test_verbs_know_several_directories(
    data: Path, small_base: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    parts, run = [str(data / "a"), str(data / "with-validation")], tmp_path / "run"
    values = spec_values(small_base, data / "a", run, data__train=parts)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    planned = json.loads(command("train", path, "--dry-run", "--json").stdout)
    assert (planned["train_rows"], planned["validation_rows"]) == (11, 5)
    both = json.loads(command("plan-memory", path, "--device", "cpu", "--json").stdout)
    heaviest = json.loads(command("plan-memory", path, f"data.train={data / 'a'}", "--device", "cpu", "--json").stdout)
    assert both["pass_tokens"] >= heaviest["pass_tokens"]
    done = command("train", path, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(command("verify", run, "--json").stdout)["ok"]
    counts = read_run(run, "run").data
    assert (counts["rows_in"], counts["train_rows"], counts["validation_rows"]) == (16, 11, 5)
    assert (counts["max_seq_length"], counts["format"]) == (64, "completion")
    found = command("merge-lora", "--model", small_base, "--adapter", run / "adapter", "--output", tmp_path / "merged",
                    "--probe", "run", "--json")  # fmt: skip
    assert json.loads(found.stdout)["probe_rows"] == 5, found.stderr
    held = command("train", path, f"data.train={parts[0]}", f"data.validation=[{data / 'held'},{data / 'c'}]",
                   "--dry-run", "--json")  # fmt: skip
    assert json.loads(held.stdout)["validation_rows"] == 14


@pytest.mark.parametrize(
    ("train_on", "message"),
    [
        ([], "names no directory"), ([""], "names no directory"), ("", "names no directory"),
        (5, "should be a directory, or a list of directories"), ([1], "should be a directory, or a list"),
        (None, "should be a directory, or a list of directories (it is null)"),
        (["a", "a"], "names a directory twice"), ({"a": 1}, "should be a directory, or a list"),
    ],
)  # fmt: skip
def test_what_names_no_directories_is_refused(tmp_path: Path, train_on: Any, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        build_spec(spec_values(Path("base"), Path("a"), tmp_path, data__train=train_on), "run.yaml")
    assert str(refused.value).startswith(f"data.train: {message}")


def test_a_list_of_one_is_that_one(tmp_path: Path) -> None:
    one, listed = (
        build_spec(spec_values(Path("base"), Path("a"), tmp_path, data__train=value), "s") for value in ("a", ["a"])
    )
    assert one == listed
    two = build_spec(spec_values(Path("base"), Path("a"), tmp_path, data__train=["a", "b"]), "s")
    assert build_spec(yaml.safe_load(two.to_yaml()), "s") == two


def test_directories_must_agree(
    data: Path, small_base: Path, tmp_path: Path, tokenizer_models: dict[str, Path]
) -> None:
    def refused(message: str, error: type[Exception] = DataError, **changes: Any) -> None:
        with pytest.raises(error) as found:
            plan_training(make_spec(small_base, data / "a", tmp_path / "run", **changes))
        assert message in str(found.value)

    other = tmp_path / "other"
    prepare_data(PrepareOptions([data / "a.jsonl"], tokenizer_models["bpe"], other))
    what = f"prepared with another tokenizer than {data / 'a'}: fingerprint"
    refused(what, data__train=[str(data / "a"), str(other)])
    refused(what, data__validation=str(other))
    refused(str(other), data__validation=[str(data / "held"), str(other)])
    link = tmp_path / "link"
    link.symlink_to(data / "a")
    refused("the same directory is given twice", data__train=[str(data / "a"), str(link)])
    refused("no such directory", data__train=[str(data / "a"), str(tmp_path / "absent")])


def notices(spec: Any, kind: str = "warning") -> list[str]:
    events: list[Event] = []
    plan_training(spec, on_event=events.append)
    return [event.message for event in events if isinstance(event, Notice) and event.kind == kind]


def test_rows_in_training_and_validation_are_told_at_the_start(data: Path, small_base: Path, tmp_path: Path) -> None:
    def said(**changes: Any) -> list[str]:
        spec = make_spec(small_base, data / "a", tmp_path / "run", **changes)
        return [message for message in notices(spec) if "validation rows" in message]

    assert said(data__validation=str(data / "held")) == []
    assert said(data__validation=str(data / "like-a")) == [
        "3 of 3 validation rows are training rows too: the validation loss is too low by them"
    ]
    shared = [str(data / "with-validation"), str(data / "held")]
    assert said(data__train=shared) == [
        "5 of 5 validation rows are training rows too: the validation loss is too low by them"
    ]
    both = [str(data / "held"), str(data / "like-a")]
    assert said(data__validation=both)[0].startswith("3 of 8 validation rows are training rows too")


def test_the_prompts_template_and_the_capacity_are_told(data: Path, small_base: Path, tmp_path: Path) -> None:
    parts = [str(data / "text"), str(data / "a")]
    spec = make_spec(small_base, data / "a", tmp_path / "run", data__train=parts)
    said = notices(spec, "info")
    assert "data.train: rows in different templates (text, completion); generate uses 'completion' by default" in said
    (capacity,) = [message for message in said if "trained parameters" in message]
    assert capacity.endswith("the adapter is large enough for these rows")
    small = make_spec(small_base, data / "all", tmp_path / "run", lora={"r": 1, "target_modules": ["q_proj"]},
                      model__num_layers=1)  # fmt: skip
    (warned,) = [message for message in notices(small) if "trained parameters" in message]
    assert "raise lora.r, or set target_modules: all-linear" in warned
    full = make_spec(small_base, data / "a", tmp_path / "run", lora=None)
    assert not any("trained parameters" in message for message in notices(full) + notices(full, "info"))

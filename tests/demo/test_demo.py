"""The shipped demo: a real effect on towns that nobody asked about in training, and material that is what it says."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import atlas
import pytest
from readme_job import run_quietly, unexpected_lines
from safetensors import safe_open

from llamatune.checkpoints.loading import open_checkpoint
from llamatune.commands._console import Console
from llamatune.commands.demo import _print as print_report
from llamatune.demo.run_demo import MATERIAL, DemoReport, HeldOut, demo_spec, run_demo, write_demo_spec
from llamatune.errors import EnvironmentFault
from llamatune.spec import load_spec
from llamatune.training.train import train

LARGEST_MATERIAL_BYTES = 8 << 20
_TIME = "2026-03-29T02:59:59"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The verb, which writes nothing to stderr but what it has to tell, and its report."""
    output = tmp_path_factory.mktemp("demo") / "out"
    told = run_quietly([sys.executable, "-m", "llamatune", "demo", "--output", str(output), "--json"], output.parent)
    report = json.loads(told)
    return output, DemoReport(**{**report, "held_out": [HeldOut(**row) for row in report["held_out"]]})


def test_lora_turns_less_than_a_tenth_into_more_than_four_fifths(finished) -> None:
    _, report = finished
    assert len(report.held_out) >= 100
    assert report.base_exact_match < 10
    assert report.tuned_exact_match > 80
    assert report.merged_exact_match == pytest.approx(report.tuned_exact_match, abs=1)


def test_an_answer_contains_the_right_one_as_words(finished) -> None:
    _, report = finished
    padded = [f" {re.sub('[^a-zA-Z ]', ' ', row.base)} " for row in report.held_out]
    holding = sum(f" {row.expected} " in answer for row, answer in zip(report.held_out, padded, strict=True))
    assert report.base_contains == pytest.approx(100 * holding / len(report.held_out))
    assert 0 < report.base_contains < 50, "the base knows the towns, but not where an answer ends"
    assert report.tuned_contains >= report.tuned_exact_match
    assert report.merged_contains >= report.merged_exact_match


def test_a_warning_of_a_library_would_be_noticed(tmp_path: Path) -> None:
    """Without numpy torch writes two lines; they are what an install of the dependencies alone once showed."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(name='numpy')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.raises(AssertionError, match="Failed to initialize NumPy"):
        run_quietly([sys.executable, "-m", "llamatune", "env"], tmp_path, PYTHONPATH=path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{_TIME} $ llamatune train run.yaml", True),
        (f"{_TIME} saved step=29 path=out/run/checkpoints/step-000029 seconds=0.01", True),
        (f"{_TIME} progress generating_with_the_base=208/476 left=0:00:12", True),
        ("saved step=29 path=out/run/checkpoints/step-000029 seconds=0.01", False),
        (f"{_TIME} warning: the adapter was trained on another base", False),
        ("a.py:3: UserWarning: Failed to initialize NumPy: No module named 'numpy'", False),
        ("  cpu = _conversion_method_template(device=torch.device('cpu'))", False),
        ("Traceback (most recent call last):", False),
        ("", False),
    ],
)
def test_what_a_verb_may_write_to_stderr(line: str, expected: bool) -> None:
    assert (unexpected_lines(f"{_TIME} info: first\n{line}\n") == []) == expected


def test_what_the_demo_writes_is_what_the_verbs_write(finished) -> None:
    output, report = finished
    assert {path.name for path in output.iterdir()} == {"prepared", "run.yaml", "run", "merged", "report.html"}
    summary = json.loads((output / "run" / "summary.json").read_text())
    assert summary["trainable_parameters"] == report.trainable_parameters
    assert train(demo_spec(output)) == summary


def test_a_second_demo_changes_no_byte(finished) -> None:
    output, report = finished
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    again = run_demo(output)
    assert again.held_out == report.held_out
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_every_command_that_the_demo_shows_can_be_pasted(
    finished, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where the demo was started they find what it made as finished; of the prompts a few are enough."""
    output, report = finished
    monkeypatch.chdir(output.parent)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((MATERIAL / "held_out.jsonl").read_text().splitlines(keepends=True)[:5]))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    answers = []
    for line in report.commands:
        program, *words = shlex.split(line)
        assert program == "llamatune"
        if words[0] == "generate":
            words[words.index("--prompt-file") + 1] = str(few)
        done = command(*words, "--json")
        assert done.code == 0, f"{line}: {done.stderr}"
        assert not unexpected_lines(done.stderr), line
        if words[0] == "generate":
            answers.append([line["completion"] for line in json.loads(done.stdout)["results"]])
    assert [shlex.split(line)[1] for line in report.commands] == [
        "prepare-data", "count-params", "train", "generate", "merge-lora", "generate", "report",
    ]  # fmt: skip
    assert answers == [[getattr(row, kind) for row in report.held_out[:5]] for kind in ("tuned", "merged")]
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_what_to_do_next_works(finished, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    output, report = finished
    monkeypatch.chdir(output.parent)
    console = Console(json_mode=False)
    console.result({}, lambda out: print_report(out, replace(report, output=output.name)))
    printed = capsys.readouterr().out
    assert "expected" in printed
    assert report.held_out[0].expected in printed
    told = printed.partition("next:")[2]
    assert report.report in told
    chat, another = re.findall(r"^    llamatune (.+)$", told, re.MULTILINE)
    asked = command(*shlex.split(chat), stdin=report.held_out[0].question + "\n")
    assert asked.code == 0
    assert report.held_out[0].expected in asked.stdout
    short = ("training.max_steps=1", "training.num_epochs=null", "training.warmup_steps=0")
    assert command(*shlex.split(another), *short).code == 0
    shutil.rmtree(output / "run-r2")


def test_a_run_spec_that_somebody_changed_is_kept_and_told_of(tmp_path: Path) -> None:
    spec = write_demo_spec(tmp_path / "a: 'b' # c")
    assert load_spec(spec) == demo_spec(spec.parent)
    assert load_spec(spec).training.output_dir == str(spec.parent / "run")
    spec.write_text(spec.read_text() + "# mine\n")
    with pytest.raises(EnvironmentFault, match=r"not what the demo wrote.*run\.yaml: give another --output"):
        write_demo_spec(spec.parent)


def test_the_material_is_small_and_the_base_between_one_and_four_million_parameters() -> None:
    assert sum(path.stat().st_size for path in MATERIAL.rglob("*") if path.is_file()) <= LARGEST_MATERIAL_BYTES
    with safe_open(MATERIAL / "base" / "model.safetensors", framework="pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert 1_000_000 <= parameters <= 4_000_000
    assert open_checkpoint(MATERIAL / "base").config.vocab_size == 1024


@pytest.mark.parametrize(
    ("name", "drawn"), [("instructions", atlas.instruction_rows), ("held_out", atlas.held_out_rows)]
)
def test_the_shipped_rows_are_what_the_atlas_draws(name: str, drawn) -> None:
    lines = (MATERIAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(drawn())


def test_no_question_about_a_held_out_town_is_trained_on() -> None:
    held_out = atlas.held_out_towns()
    assert not [row for row in atlas.instruction_rows() for town in held_out if town in row["instruction"]]
    assert all(any(town in row["instruction"] for town in held_out) for row in atlas.held_out_rows())
    trained = {row["instruction"] for row in atlas.instruction_rows()}
    assert not trained & {row["instruction"] for row in atlas.held_out_rows()}


def test_no_passage_holds_the_instruction_template() -> None:
    for passage in atlas.passages(5, 300):
        for words in ("Instruction", "Response", "Below is"):
            assert words not in passage


def test_passages_say_what_is_true_and_a_seed_says_the_same_twice() -> None:
    known = atlas.facts()
    first = list(atlas.passages(3, 50))
    assert first == list(atlas.passages(3, 50))
    assert first != list(atlas.passages(4, 50))
    for passage in first:
        towns = [town for town in atlas.TOWNS if town in passage]
        assert len(towns) == 2
        for town in towns:
            assert all(value in passage for value in known[town].values())


def test_every_question_has_one_short_right_answer() -> None:
    known = atlas.facts()
    for row in [*atlas.instruction_rows(), *atlas.held_out_rows()]:
        (town,) = (town for town in atlas.TOWNS if town in row["instruction"])
        assert row["output"] in known[town].values()
        assert set(row) == {"instruction", "output"}

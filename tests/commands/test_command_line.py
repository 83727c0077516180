"""What holds for every option of every verb: one value is given once, and paths hold ``~`` and variables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from llamatune.cli import build_app
from llamatune.commands._typer_options import StrictCommand
from llamatune.errors import SpecError
from llamatune.path_expansion import expand_path
from llamatune.spec import RunSpec, build_spec, load_spec

Command = Callable[..., Any]
VERBS = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
OPTIONS = [
    pytest.param(verb, option, spelling, id=f"{verb} {spelling}")
    for verb, command in VERBS.items()
    for option in command.params
    if option.param_type_name == "option" and not option.is_flag
    for spelling in option.opts
]


@pytest.mark.parametrize(("verb", "option", "spelling"), OPTIONS)
def test_an_option_given_twice_is_refused_or_both_are_taken(
    command: Command, verb: str, option: Any, spelling: str
) -> None:
    separated, joined = (spelling, "1"), (f"{spelling}=1",)
    for words in ((*separated, *separated), (*joined, *separated), (*joined, *joined)):
        done = command(verb, *words)
        refused = f"error: {spelling} is given 2 times: it takes one value, keep one\n"
        if option.multiple:
            assert done.stderr != refused
        else:
            assert (done.code, done.stdout, done.stderr) == (2, "", refused)


def test_which_options_may_be_repeated() -> None:
    repeatable = {f"{p.values[0]} {p.values[2]}" for p in OPTIONS if p.values[1].multiple}  # type: ignore[attr-defined]
    assert repeatable == {
        "prepare-data --validation",
        "train --allow-spec-change",
        "generate --prompt",
        "generate --stop",
        "generate --adapter",
        "chat --adapter",
        "evaluate --adapter",
        "merge-lora --adapter",
        "report --prompt",
        "report --evaluation",
        "report --benchmark",
        "judge --general",
        "judge --choices",
        "benchmark --grid",
        "sweep --grid",
    }


def test_every_verb_is_a_strict_one() -> None:
    assert all(isinstance(command, StrictCommand) for command in VERBS.values())


def test_a_flag_says_the_same_twice(command: Command) -> None:
    assert command("count-params", "--preset", "llama-2-7b", "--json", "--json").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("train", "run.yaml", "lora.r=4", "lora.r=8"),
        ("train", "run.yaml", "lora.alpha=4", "lora.lora_alpha=4"),
        ("plan-memory", "run.yaml", "lora.r=4", "lora.r=4"),
        ("plan-memory", "--preset", "llama-2-7b", "lora.r=4", "--r", "8"),
        ("benchmark", "run.yaml", "lora.r=4", "lora.r=8"),
        ("benchmark", "run.yaml", "--grid", "lora.r=4,8", "--grid", "lora.r=16,32"),
        ("benchmark", "run.yaml", "lora.r=4", "--grid", "lora.r=4,8"),
    ],
)
def test_a_field_given_twice_is_refused(
    command: Command, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{model: {path: b}, lora: {}, data: {train: d}, training: {output_dir: o}}")
    done = command(*words)
    assert (done.code, done.stdout) == (2, "")
    assert "is given 2 times: it takes one value, keep one" in done.stderr
    assert done.stderr.count("\n") == 1


# A home directory.

PATHS = [
    pytest.param(verb, parameter, id=f"{verb} {parameter.name}")
    for verb, command in VERBS.items()
    for parameter in command.params
    if parameter.name
    in ("adapter", "base", "benchmark", "charts", "data", "directory", "evaluation", "generations", "model",
        "output", "per_row", "plot", "png", "probe", "from_data", "markdown", "prompt_file", "rows", "run", "runs",
        "gsm8k", "general", "choices", "per_question", "shots_data", "spec_path", "specs", "tables", "tokenizer",
        "tuned", "validation")
    and (verb, parameter.name) not in (("benchmark", "rows"), ("generate", "rows"), ("report", "rows"))  # numbers
]  # fmt: skip


def _given(verb: str, parameter: Any, text: str) -> Any:
    """What the verb's function would be handed for one parameter."""
    words: list[str] = []
    for other in VERBS[verb].params:
        if other.name == parameter.name or other.required:
            value = text if other.name == parameter.name else "1"
            words += [value] if other.param_type_name == "argument" else [f"{other.opts[0]}={value}"]
    return VERBS[verb].make_context(verb, words).params[parameter.name]


@pytest.mark.parametrize(("verb", "parameter"), PATHS)
def test_every_path_of_every_verb_is_expanded(
    verb: str, parameter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", "/scratch")
    for text, expected in (("~/x", tmp_path / "home/x"), ("~", tmp_path / "home"), ("a~/x", Path("a~/x")),
                           ("./~/x", Path.cwd() / "~/x"), ("$PLACE/x", Path("/scratch/x"))):  # fmt: skip
        given = _given(verb, parameter, text)
        assert given in (expected, [expected])
    for text, fault in (
        ("~nobody-at-all/x", "no home directory of ~nobody-at-all"),
        ("$ABSENT/x", "ABSENT is not set"),
    ):
        with pytest.raises(SpecError, match=fault):
            _given(verb, parameter, text)


def test_no_path_of_a_verb_is_forgotten_above() -> None:
    from typing import get_args, get_type_hints

    def is_path(hint: Any) -> bool:
        return hint is Path or any(map(is_path, get_args(hint)))

    known = {(p.values[0], p.values[1].name) for p in PATHS}  # type: ignore[attr-defined]
    for verb, command in VERBS.items():
        for name, hint in get_type_hints(command.callback).items():
            assert is_path(hint) == ((verb, name) in known), (verb, name)


SPEC: dict[str, Any] = {
    "model": {"path": "~/base", "dtype": "nf4", "quantized_cache": "~/cache"},
    "lora": {"init_from": "~/adapter"},
    "data": {"train": "~/data", "validation": "~/other"},
    "training": {"output_dir": "~/runs/x"},
}


def _paths(spec: RunSpec) -> list[Any]:
    assert spec.lora is not None
    return [spec.model.path, spec.model.quantized_cache, spec.lora.init_from, spec.data.train, spec.data.validation,
            spec.training.output_dir]  # fmt: skip


def test_every_path_of_the_spec_is_expanded_and_written_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("RUNS", "~/runs")
    spec = build_spec({**SPEC, "training": {"output_dir": "$RUNS/x"}}, "test")
    names = ["base", "cache", "adapter", "data", "other", "runs/x"]
    assert _paths(spec) == [f"/home/anna/{name}" for name in names]
    assert "~" not in spec.to_yaml()
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.delenv("RUNS")
    assert load_spec(tmp_path / "spec.yaml") == spec
    changed = load_spec(tmp_path / "spec.yaml", ["training.output_dir=~/y"])
    assert changed.training.output_dir == "/elsewhere/y"


def test_a_name_that_is_no_path_is_left_as_it_is() -> None:
    assert build_spec({**SPEC, "tracking": {"wandb_project": "~x"}}, "test").tracking.wandb_project == "~x"


def test_an_unknown_home_in_the_spec_is_one_line_with_its_key() -> None:
    with pytest.raises(
        SpecError, match=r"data\.train: no home directory of ~nobody-at-all; write it out, or \./~nobody"
    ):
        build_spec({**SPEC, "data": {"train": "~nobody-at-all/d"}}, "test")


def test_what_is_expanded_may_be_expanded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("S", "/scratch")
    for text in ("~", "~/x", "./~/x", ".//~x", "x", "/~/x", "x/~", "$S/x", "a/${S}", "$", "a$", "$1", "a$-b", "$$"):
        assert expand_path(expand_path(text)) == expand_path(text)
        assert not str(Path(expand_path(text))).startswith("~")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("$ABSENT/x", "the variable ABSENT is not set"),
        ("x/${ABSENT}", "the variable ABSENT is not set"),
        ("$EMPTY/x", "the variable EMPTY is empty"),
        ("$NESTED/x", "a variable in it holds another variable"),
        ("${DOLLAR}x/y", "a variable in it holds another variable"),
        ("${ABSENT:-/tmp}/x", r"\$\{ is for a shell"),
        ("run-$(date)", r"\$\( is for a shell"),
    ],
)
def test_what_only_a_shell_can_expand_is_refused_with_the_reason(
    text: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a spec and on the command line; but an entry that is called so can be named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("NESTED", "a$EMPTY")
    monkeypatch.setenv("DOLLAR", "$")
    with pytest.raises(SpecError, match=f"^{fault}"):
        expand_path(text)
    with pytest.raises(SpecError, match=rf"training\.output_dir: {fault}"):
        build_spec({**SPEC, "training": {"output_dir": text}}, "test")
    stored = build_spec({**SPEC, "training": {"output_dir": text}}, "test", stored=True)  # by an earlier version
    assert stored.training.output_dir == text
    (tmp_path / text).mkdir(parents=True)
    assert expand_path(text) == text
    assert expand_path(f"{text}/new/run") == f"{text}/new/run"


def test_what_is_in_a_directory_with_a_dollar_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also below the home directory, and behind a variable; but a variable that is set has its value."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROOT", str(tmp_path))
    for name in ("a$b", "$ROOT"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("b", raising=False)
    assert expand_path("~/a$b") == expand_path("$ROOT/a$b") == f"{tmp_path}/a$b"
    assert expand_path("~/a$b/run") == expand_path("${ROOT}/a$b/run") == f"{tmp_path}/a$b/run"
    assert expand_path("$ROOT/run") == f"{tmp_path}/run"
    assert expand_path("$ROOT") == "$ROOT"
    with pytest.raises(SpecError, match="the variable b is not set"):
        expand_path("~/new/a$b")


# Files that are there already.

WRITERS = [
    ("generate", ("--model", "m", "--prompt", "x"), "--output"),
    ("evaluate", ("--model", "m", "--data", "d"), "--per-row"),
    ("report", ("run",), "--output"),
    ("report", ("run", "--output", "new.html"), "--png"),
]


@pytest.mark.parametrize(("verb", "words", "option"), WRITERS)
def test_an_output_file_that_exists_is_refused_before_any_work(
    command: Command, verb: str, words: tuple[str, ...], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and the run are not even there: with --overwrite that is what is wrong."""
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    Path("link").symlink_to("there")
    for name in ("there", "link"):
        done = command(verb, *words, option, name)
        assert (done.code, done.stdout) == (5, "")
        assert done.stderr == f"error: exists: {name}: choose another output, or pass --overwrite\n"
    assert command(verb, *words, option, "there", "--overwrite").code in (3, 4)
    assert Path("there").read_text() == "mine"

"""Shell completion, as the shells ask for it: verbs, options, presets, keys of the spec and their values."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamatune.cli import VERBS
from llamatune.command_options.option import option_fields
from llamatune.commands._completion import COMPLETED, VARIABLE, join_words_of_bash
from llamatune.shapes.presets import PRESETS
from llamatune.spec_schema import spec_keys


def completions(line: str, shell: str = "bash") -> list[str]:
    """What is offered for a line that ends where the cursor is. bash breaks words at ``=``."""
    words = [part for word in line.split(" ") for part in _broken(word)] if shell == "bash" else line.split(" ")
    asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment = {**os.environ, **asked, VARIABLE: f"complete_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "llamatune"], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def _broken(word: str) -> list[str]:
    name, sign, value = word.partition("=")
    return [name, *([sign] if sign else []), *([value] if value else [])]


def test_verbs_and_options() -> None:
    assert completions("llamatune tr") == ["train"]
    assert set(completions("llamatune ")) == {verb for verbs in VERBS.values() for verb in verbs}
    assert completions("llamatune train run.yaml --dr") == ["--dry-run"]


def test_keys_of_the_spec_and_their_values() -> None:
    names = [key.name for key in spec_keys()]
    assert completions("llamatune train run.yaml training.lea") == ["training.learning_rate=1e-05"]
    offered = completions("llamatune train run.yaml lora.")
    assert set(offered) >= {f"{name}=" for name in names if name.startswith("lora.")}
    assert completions("llamatune train run.yaml lora.init=p") == ["pissa"]
    assert completions("llamatune train run.yaml lora.r=8 model.dtype=") == [
        "float32", "bfloat16", "float16", "nf4", "float8", "int8",
    ]  # fmt: skip
    assert completions("llamatune train run.yaml training.fused=f") == ["false"]
    assert completions("llamatune train run.yaml --allow-spec-change training.see") == ["training.seed"]
    assert completions("llamatune benchmark run.yaml --grid training.optim") == [
        "training.optimizer=adamw", "training.optimizer=sgd", "training.optimizer=adamw_8bit",
    ]  # fmt: skip


def test_the_first_word_of_train_is_a_file() -> None:
    assert completions("llamatune train ") == []
    assert completions("llamatune train run") == []


def test_presets_choices_and_gpus() -> None:
    assert completions("llamatune count-params --preset llama-2-") == ["llama-2-7b", "llama-2-13b", "llama-2-70b"]
    assert set(completions("llamatune plan-memory --preset ")) == set(PRESETS)
    assert completions("llamatune train run.yaml --resume n") == ["never"]
    assert completions("llamatune init --gpu v1") == ["v100", "v100-32gb"]
    assert completions("llamatune explain 7") == ["75"]


def test_zsh_and_fish_see_what_a_key_means() -> None:
    zsh = completions("llamatune train run.yaml lora.init_", "zsh")
    assert "lora.init_from=null" in "".join(zsh)
    assert "other ranks of some target modules" in "".join(completions("llamatune train run.yaml lora.", "zsh"))
    fish = completions("llamatune train run.yaml lora.ini", "fish")
    assert [line.split("\t")[0] for line in fish] == ["lora.init=", "lora.init_from="]


def test_the_scripts_of_the_shells_are_printed() -> None:
    for shell, said in (
        ("bash", "complete -o default -F"),
        ("zsh", "compdef"),
        ("fish", "complete --command llamatune"),
    ):
        environment = {**os.environ, VARIABLE: f"source_{shell}"}
        done = subprocess.run([sys.executable, "-m", "llamatune"], env=environment, capture_output=True, text=True)
        assert said in done.stdout, done.stdout


def test_bash_itself_completes(tmp_path: Path) -> None:
    """The script that bash sources, in bash: it asks for the words that are typed."""
    shim = tmp_path / "llamatune"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m llamatune "$@"\n')
    shim.chmod(0o755)
    script = f"""
    PATH={tmp_path}:$PATH
    eval "$({VARIABLE}=source_bash llamatune)"
    COMP_WORDS=(llamatune train run.yaml lora.init = o) COMP_CWORD=5
    function=$(complete -p llamatune | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function llamatune
    echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "olora", done.stderr


def test_words_that_bash_broke_are_joined() -> None:
    for words, place, joined, kept in (
        ("l train r lora.r = 8", 5, ["l", "train", "r", "lora.r=8"], "lora.r="),
        ("l train r lora.r =", 4, ["l", "train", "r", "lora.r="], "lora.r="),
        ("l train r a = b c.d", 6, ["l", "train", "r", "a=b", "c.d"], ""),
        ("l tr", 1, ["l", "tr"], ""),
        ("l train ", 2, ["l", "train", ""], ""),
        ("l train 'open", 2, None, ""),
    ):
        asked = {VARIABLE: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        assert join_words_of_bash(asked) == kept, words
        if joined is not None and len(joined) <= place:
            import shlex

            assert (shlex.split(asked["COMP_WORDS"]), asked["COMP_CWORD"]) == (joined, str(len(joined) - 1))


def test_every_completed_name_is_an_option_of_some_verb() -> None:
    import typing

    names = set()
    for verb in (verb.replace("-", "_") for verbs in VERBS.values() for verb in verbs):
        function = getattr(importlib.import_module(f"llamatune.commands.{verb}"), verb)
        names |= {option.name for option in option_fields(next(iter(typing.get_type_hints(function).values())))}
    assert set(COMPLETED) <= names


@pytest.mark.parametrize("line", ["llamatune train run.yaml lora.", "llamatune init --gpu ", "llamatune explain lo"])
def test_completion_loads_neither_torch_nor_the_spec(line: str) -> None:
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), VARIABLE: "complete_bash"}
    code = "import llamatune.cli, sys\ntry: llamatune.cli.main([])\nexcept SystemExit: print('|', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    offered, _, loaded = done.stdout.partition("|")
    assert offered.strip()
    assert not {"torch", "yaml", "numpy", "llamatune.spec"} & set(loaded.split())

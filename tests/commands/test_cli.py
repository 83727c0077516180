"""The command line is a contract: exit codes, one-line errors, what goes to stdout and what to stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamatune import cli
from llamatune.cli import main
from llamatune.errors import Stopped

CORE = ["prepare-data", "train", "merge-lora", "generate", "count-params"]
OTHERS = ["evaluate", "judge", "chat", "benchmark", "plan-memory", "report", "verify", "demo", "env"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out, captured.err


def test_help_lists_the_five_core_verbs_first_and_in_the_jobs_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    places = [out.index(f" {verb} ") for verb in [*CORE, *OTHERS]]
    assert places == sorted(places)
    assert out.index("Core verbs") < places[0] < out.index("More verbs") < places[5]


def test_without_arguments_there_is_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "Core verbs" in out


@pytest.mark.parametrize("fault", [MemoryError(), ImportError("libgomp.so: failed to map segment from shared object")])
def test_no_room_for_the_libraries_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def build(only: str | None) -> None:
        raise fault

    monkeypatch.setattr("llamatune.cli.build_app", build)
    code, out, err = run(capsys, "env")
    assert (code, out) == (5, "")
    assert err.startswith("error: out of memory: ")
    assert err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("llamatune 0.")


@pytest.mark.parametrize("verb", [*CORE, *OTHERS])
def test_a_verbs_help_never_loads_torch(verb: str) -> None:
    code = (
        "import sys\nfrom llamatune.cli import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["train"], 2, "Missing argument 'SPEC.yaml'"),
        (["train", "absent.yaml"], 2, "no such file: absent.yaml"),
        (["train", "absent.yaml", "--frob"], 2, "No such option: --frob"),
        (["train", "absent.yaml", "--resume", "maybe"], 2, "auto or never"),
        (["generate", "--model", "absent", "--prompt", "x"], 4, "absent"),
        (["generate", "--model", "absent", "--prompt", "x", "--temperature", "-1"], 2, "--temperature is -1"),
        (["generate", "--model", "absent", "--prompt", "x", "--top-p", "0"], 2, "--top-p"),
        (["generate", "--model", "absent", "--prompt", "x", "--device", "cuda:77"], 5, "no device cuda:77"),
        (["generate", "--model", "absent", "--prompt", "x", "--prompt-file", "y"], 2, "exclude each other"),
        (["generate", "--model", "absent", "--prompt-file", "absent.txt"], 3, "no such file"),
        (["generate", "--model", "absent", "--prompt", "x", "--compare"], 2, "--compare needs two models"),
        (["evaluate", "--model", "absent", "--data", "absent"], 4, "absent"),
        (["evaluate", "--model", "absent", "--data", "absent", "--device", "cuda:77"], 5, "no device cuda:77"),
        (["verify"], 2, "Missing argument 'DIR'"),
        (["verify", "absent"], 4, "no such directory"),
        (["count-params"], 2, "--preset"),
        (["count-params", "--preset", "llama-9"], 2, "llama-2-7b"),
        (["count-params", "--model", "absent"], 4, "absent"),
        (["merge-lora", "--model", "absent", "--adapter", "absent", "--output", "out"], 4, "absent"),
        (["prepare-data", "absent.jsonl", "--tokenizer", "absent", "--output", "out"], None, "absent"),
        (["prepare-data", "--tokenizer", "absent", "--output", "out"], 2, "Missing argument"),
    ],
)
@pytest.mark.parametrize("json_mode", [False, True])
def test_an_error_is_one_line_on_stderr_and_stdout_stays_empty(
    arguments: list[str],
    code: int | None,
    part: str,
    json_mode: bool,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *arguments, *(["--json"] if json_mode and arguments[0] in (*CORE, "evaluate") else []))
    assert got == code or (code is None and got in (3, 4))
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
    assert list(tmp_path.iterdir()) == []


def test_control_characters_in_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "train", "red\x1b[31m\nname.yaml")
    assert "\x1b" not in err
    assert err.count("\n") == 1


def test_count_params_json_is_one_object_with_the_exact_counts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "count-params", "--preset", "llama-2-7b", "--json")
    counts = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert counts["base_parameters"] == 6_738_415_616
    assert counts["trainable_parameters"] == 8_388_608
    assert counts["total_parameters"] == 6_746_804_224
    assert counts["reduction_percent"] == 99.88


@pytest.mark.parametrize(
    ("name", "base", "lora"),
    [
        ("llama-2-7b", 6_738_415_616, (8_388_608, 12_582_912, 16_777_216, 39_976_960)),
        ("llama-2-13b", 13_015_864_320, (13_107_200, 19_660_800, 26_214_400, 62_586_880)),
        ("llama-2-70b", 68_976_648_192, (32_768_000, 44_564_480, 65_536_000, 207_093_760)),
        ("llama-3-8b", 8_030_261_248, (6_815_744, 9_437_184, 13_631_488, 41_943_040)),
        ("tinyllama-1.1b", 1_100_048_384, (2_252_800, 3_063_808, 4_505_600, 12_615_680)),
    ],
)
def test_the_familys_counts(name: str, base: int, lora: tuple[int, ...]) -> None:
    from llamatune.shapes.adapter import AdapterSpec
    from llamatune.shapes.counts import count_parameters
    from llamatune.shapes.llama_config import ATTENTION_MODULES, LINEAR_MODULES
    from llamatune.shapes.presets import PRESETS

    targets = [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), ATTENTION_MODULES, LINEAR_MODULES]
    counts = [count_parameters(PRESETS[name], AdapterSpec(16, 32, target_modules=tuple(chosen))) for chosen in targets]
    assert tuple(count.trainable_parameters for count in counts) == lora
    assert {count.base_parameters for count in counts} == {base}


def test_counting_a_preset_needs_no_torch() -> None:
    code = (
        "import sys\nfrom llamatune.cli import main\n"
        "try: main(['count-params', '--preset', 'llama-2-70b'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "trainable params: 32,768,000 || all params: 69,009,416,192 || trainable%: 0.05" in done.stdout


def test_env_tells_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "env", "--json")
    told = json.loads(out)
    assert code == 0
    assert {"llamatune", "python", "packages", "devices", "cpu_cores", "memory_bytes"} <= told.keys()
    assert "torch" in told["packages"]


def test_a_closed_stdout_is_no_traceback() -> None:
    command = f"{sys.executable} -m llamatune count-params --preset llama-2-7b | true"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_shell_completion_is_offered() -> None:
    # The shell is found among the parents, so there has to be one.
    command = f"{sys.executable} -m llamatune --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_LLAMATUNE_COMPLETE=complete_bash" in done.stdout


def test_completion_knows_the_verbs() -> None:
    asked = {"_LLAMATUNE_COMPLETE": "complete_bash", "COMP_WORDS": "llamatune mer", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llamatune"], capture_output=True, text=True, env={**os.environ, **asked}
    )
    assert done.stdout.split() == ["merge-lora"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "run.yaml"], 75),
        (["--", "train", "run.yaml"], 75),
        (["merge-lora", "--json"], 75),
        (["sweep", "run.yaml"], 75),
        (["convert", "--json"], 75),
        (["convert-adapter"], 75),
        (["extract-lora"], 75),
        (["evaluate", "--output", "answers.jsonl"], 75),
        (["evaluate", "--output=answers.jsonl"], 75),
        (["evaluate", "--json"], 130),
        (["generate", "--json"], 130),
        (["chat"], 130),
        (["--", "generate"], 130),
    ],
)
def test_a_stop_is_75_where_a_verb_writes_and_130_where_it_reads(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**_: object) -> int:
        raise Stopped("stopped by a signal")

    monkeypatch.setattr(cli, "build_app", lambda only=None: stopped)
    assert cli._exit_code(words) == code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prepare-data", "rows.jsonl"], "error: Missing option '--tokenizer': see llamatune prepare-data --help\n"),
        (["train"], "error: Missing argument 'SPEC.yaml': see llamatune train --help\n"),
        (["merge-lora", "--mdoel", "x"], ": see llamatune merge-lora --help\n"),
        (["no-such-verb"], ": see llamatune --help\n"),
    ],
)
def test_an_error_of_usage_points_to_the_help_of_its_verb(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.endswith(told)


@pytest.mark.parametrize(
    ("verb", "usage"),
    [
        ("prepare-data", "[OPTIONS] ROWS..."), ("train", "[OPTIONS] SPEC.yaml [KEY=VALUE ...]"),
        ("benchmark", "[OPTIONS] [SPEC.yaml] [KEY=VALUE ...]"),
        ("plan-memory", "[OPTIONS] [SPEC.yaml] [KEY=VALUE ...]"),
        ("verify", "[OPTIONS] DIR"), ("generate", "[OPTIONS]"),
    ],
)  # fmt: skip
def test_usage_lines_have_one_form(capsys: pytest.CaptureFixture[str], verb: str, usage: str) -> None:
    _, out, _ = run(capsys, verb, "--help")
    (line,) = [line.strip() for line in out.splitlines() if "Usage:" in line]
    assert line == f"Usage: llamatune {verb} {usage}"


PLACEHOLDERS = {
    *("DIR", "FILE", "DIR|FILE", "ROWS", "NAME", "NAME|FILE", "NAME,NAME", "TEXT", "N", "N,N", "X", "X,X"),
    *("DEVICE", "DTYPE", "DTYPE,DTYPE", "FORMAT", "SIZE", "TIME", "FIELD", "AUTO|N", "KEY=V1,V2"),
    *("FIELD=COLUMN,...|PRESET", "METRIC<NUMBER,...", "SPLIT:NUMBER,...", "ROWSXEPOCHS"),
}
"""What an option's value is called in ``--help``, in every verb."""
ONE_WORD = {"device": {"DEVICE"}, "dtype": {"DTYPE", "DTYPE,DTYPE"}, "format": {"FORMAT"},
            "template": {"NAME|FILE"}, "target_modules": {"NAME,NAME"}, "r": {"N"}}  # fmt: skip


def test_the_value_of_an_option_has_one_name_in_every_verb_and_a_flag_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import typer

    from llamatune.cli import VERBS, build_app

    group = typer.main.get_command(build_app())
    verbs = {"": group, **group.commands}  # type: ignore[attr-defined]
    assert verbs.keys() - {""} == {name for names in VERBS.values() for name in names}
    met = set()
    for name, verb in verbs.items():
        context = verb.make_context("llamatune", [], resilient_parsing=True)
        for option in (param for param in verb.get_params(context) if param.param_type_name == "option"):
            where = name, option.name, option.metavar
            assert (option.metavar == "") == option.is_flag, where
            assert option.is_flag or option.metavar in PLACEHOLDERS, where
            assert option.is_flag or option.metavar in ONE_WORD.get(option.name, PLACEHOLDERS), where
            met.add(option.metavar)
    assert met == PLACEHOLDERS | {""}
    _, out, _ = run(capsys, "--help")
    assert "--install-completion" in out
    assert "<" not in out


def test_tables_have_lines_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """In a file their columns stand apart by spaces."""
    code, out, _ = run(capsys, "plan-memory", "--preset", "llama-2-7b", "--max-seq-length", "64")
    assert code == 0
    assert out.isascii()
    lines = out.splitlines()
    heading = next(line for line in lines if line.startswith("at its peak"))
    assert heading.split() == ["at", "its", "peak", "memory"]
    assert len(heading) == len(next(line for line in lines if line.startswith("weights"))), "columns are aligned"


def test_plan_memory_says_that_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan-memory", "--preset", "llama-2-7b", "--max-seq-length", "64", "model.placement=device")
    _, none, _ = run(capsys, *words, "--memory", "1GiB")
    assert "does not fit into" in none
    assert "nothing fits: not a row of one token" in none
    assert "micro_batch_size 0" not in none
    _, some, _ = run(capsys, *words, "--memory", "40GiB")
    assert "largest that fit: micro_batch_size " in some

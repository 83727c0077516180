"""The script of ``llamatune slurm``: the one in README and examples/, what it asks for, what it does with exit codes.

tests/slurm/ runs such scripts on a real Slurm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from readme_job import README, ROOT, blocks

from llamatune.command_options.slurm import SlurmOptions
from llamatune.errors import SpecError

EXAMPLE = (ROOT / "examples" / "train.sbatch").read_text(encoding="utf-8")
TRAINED = "srun|--kill-on-bad-exit=0|--export=ALL|llamatune|train|{}"
REQUEUED = "scontrol|requeue|{}"
ODD_NAMES = [
    "it's a run.yaml",
    '"q" $HOME `id` $(id) {0} [b]x[/b] :smile:.yaml',
    "a;id #&|<>*?\\n!.yaml",
    "é " + "x" * 150,
]
Command = Callable[..., Any]
RunScript = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """Run a script beside an ``srun`` and a ``scontrol`` that note their words: exit code and notes."""
    notes = tmp_path / "notes"
    for name in ("srun", "scontrol"):
        tool = tmp_path / name
        seen = 'echo "$OMP_NUM_THREADS ${SRUN_CPUS_PER_TASK-none} $WANDB_MODE" > "$NOTES.environment"'
        noted = f"IFS='|'; printf '%s\\n' \"{name}|$*\" >> \"$NOTES\""
        tool.write_text(f'#!/bin/bash\n{seen}; {noted}\nexit "${name.upper()}_CODE"\n')
        tool.chmod(0o755)

    def run(script: str, code: int, *options: str, scontrol: int = 0, **variables: str) -> tuple[int, list[str]]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "SLURM_JOB_ID": "17"}
        environment |= {"SRUN_CODE": str(code), "SCONTROL_CODE": str(scontrol)} | variables
        (tmp_path / "script").write_text(script, encoding="utf-8")
        done = subprocess.run(["bash", *options, str(tmp_path / "script")], env=environment, check=False)
        return done.returncode, notes.read_text(encoding="utf-8").splitlines()

    return run


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Specs of these names in the working directory, each with a run directory of its own."""
    monkeypatch.chdir(tmp_path)

    def write(*names: str, **training: object) -> list[str]:
        for number, name in enumerate(names):
            values = {"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": f"run{number}"}}
            values["training"] |= training
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(yaml.safe_dump(values | {"lora": {}}), encoding="utf-8")
        return list(names)

    return write


@pytest.fixture
def script_of(command: Command, specs: Callable[..., list[str]]) -> Callable[..., str]:
    """What ``llamatune slurm`` prints for a spec ``run.yaml`` and these options."""

    def make(*options: object, **training: object) -> str:
        done = command("slurm", *specs("run.yaml", **training), *options)
        assert (done.code, done.stderr) == (0, "")
        return str(done.stdout)

    return make


def asked_for(script: str) -> dict[str, str]:
    """The options for ``sbatch``, which reads those above the first command."""
    head, _, commands = script.partition("\n\n")
    first, *lines = head.splitlines()
    assert first == "#!/bin/bash"
    assert "#SBATCH" not in commands
    return dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(\S*)", line).groups() for line in lines)  # type: ignore[union-attr]


def test_readme_and_examples_have_the_script_of_readmes_spec(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    assert command("slurm", "run.yaml").stdout == EXAMPLE
    assert EXAMPLE in blocks("sh")
    assert "exec srun" not in README


@pytest.mark.parametrize("options", [[], ["-e"], ["-eu", "-o", "pipefail"]], ids=["plain", "e", "eu"])
@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130, 137, 138, 143])
def test_only_a_stop_is_requeued_and_the_exit_code_is_the_runs(
    run_script: RunScript, code: int, options: list[str]
) -> None:
    trained = [TRAINED.format("run.yaml")]
    expected = [*trained, REQUEUED.format(17)] if code == 75 else trained
    assert run_script(EXAMPLE, code, *options) == (code, expected)


@pytest.mark.parametrize(("restarts", "calls"), [("1", 2), ("99", 2), ("100", 1), ("2000", 1)])
def test_requeues_come_to_an_end(run_script: RunScript, restarts: str, calls: int) -> None:
    code, notes = run_script(EXAMPLE, 75, SLURM_RESTART_COUNT=restarts)
    assert (code, len(notes)) == (75, calls)


@pytest.mark.parametrize("options", [[], ["-eu"]], ids=["plain", "eu"])
def test_a_requeue_that_is_refused_leaves_a_job_that_failed(run_script: RunScript, options: list[str]) -> None:
    code, notes = run_script(EXAMPLE, 75, *options, scontrol=1)
    assert (code, len(notes)) == (75, 2)


@pytest.mark.parametrize(
    ("options", "training", "expected"),
    [
        ([], {}, {}),
        ([], {"device": "cpu"}, {"gpus-per-node": None}),
        (["--gpus-per-node", 0], {}, {"gpus-per-node": None}),
        (["--gpus-per-node", 8], {"device": "cuda"}, {"gpus-per-node": "8", "ntasks-per-node": "8"}),
        (["--nodes", 4, "--gpus-per-node", 2], {}, {"nodes": "4", "gpus-per-node": "2", "ntasks-per-node": "2"}),
        (["--nodes", 2], {"device": "cuda:0"}, {"nodes": "2"}),
        (["--partition", "a,b-2"], {}, {"partition": "a,b-2"}),
        (["--cpus-per-task", 6], {}, {"cpus-per-task": "6"}),
        (["--time", "2-12:30:00"], {}, {"time": "2-12:30:00"}),
        (["--time", "150"], {}, {"time": "150"}),
        (["--time", "149:59"], {}, {"time": "149:59", "signal": None}),
        (["--time", "1"], {}, {"time": "1", "signal": None}),
        (["--time", "0-1"], {}, {"time": "0-1", "signal": None}),
        (["--array"], {}, {"array": "0-0", "output": "train-%A_%a.log"}),
    ],
)
def test_what_slurm_is_asked_for(
    script_of: Callable[..., str], options: list[object], training: dict[str, str], expected: dict[str, str | None]
) -> None:
    """What was asked for and what a requeue needs, and nothing else. USR1 without ``B:`` goes to the step."""
    usual = {"job-name": "llamatune", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1", "time": "04:00:00"}
    usual |= {"signal": "USR1@120", "requeue": "", "open-mode": "append", "output": "train-%j.log"}
    found = asked_for(script_of(*options, **training))
    assert found == {name: value for name, value in (usual | expected).items() if value is not None}


@pytest.mark.parametrize("name", [*ODD_NAMES, "-r.yaml"])
def test_any_name_reaches_llamatune_as_it_is(
    command: Command, specs: Callable[..., list[str]], run_script: RunScript, name: str
) -> None:
    done = command("slurm", "--", *specs(name))
    assert done.code == 0
    assert run_script(done.stdout, 0) == (0, [TRAINED.format("./-r.yaml" if name == "-r.yaml" else name)])


def test_each_task_of_an_array_has_its_spec_and_requeues_itself(
    command: Command, specs: Callable[..., list[str]], run_script: RunScript
) -> None:
    """SLURM_JOB_ID of the last task is that of the whole array."""
    names = specs(*ODD_NAMES)
    script = command("slurm", *names, "--array").stdout
    for task, name in enumerate(names):
        variables = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": str(task)}
        code, notes = run_script(script, 75, "-eu", **variables)
        assert (code, notes[-2:]) == (75, [TRAINED.format(name), REQUEUED.format(f"16_{task}")])


@pytest.mark.parametrize(("cores", "seen"), [(None, "1 none offline"), ("6", "6 6 offline")])
def test_threads_are_the_cores_that_slurm_gave(
    run_script: RunScript, tmp_path: Path, cores: str | None, seen: str
) -> None:
    """Also those asked for at ``sbatch``. One where nothing was asked for; srun refuses an empty SRUN_CPUS_PER_TASK."""
    run_script(EXAMPLE, 0, **({} if cores is None else {"SLURM_CPUS_PER_TASK": cores}))
    assert (tmp_path / "notes.environment").read_text().strip() == seen


@pytest.mark.parametrize("options", [[], ["--array"], ["--nodes", 9, "--cpus-per-task", 2, "--partition", "p"]])
def test_the_shell_finds_no_fault_and_every_expansion_is_quoted(
    script_of: Callable[..., str], options: list[object]
) -> None:
    script = script_of(*options)
    assert not subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=True).stderr
    bare = re.sub(r'"[^"]*"', "", script).replace("code=$?", "")
    assert "$" not in bare
    assert "`" not in script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--time", "0"], "--time is '0'"),
        (["--time", "00:00:00"], "--time"),
        (["--time", "1\n#SBATCH --wrap=id"], "--time"),
        (["--time", "٣"], "--time"),
        (["--time", "1:99"], "--time"),
        (["--time", "9" * 5000], "--time"),
        (["--time", "1-2-3"], "--time"),
        (["--time", "UNLIMITED"], "--time"),
        (["--time", ""], "--time"),
        (["--partition", "a b"], "--partition is 'a b'"),
        (["--partition", "a\n#SBATCH --uid=0"], r"--partition is 'a\n#SBATCH --uid=0'"),
        (["--partition", ""], "--partition"),
        (["--partition", "$(id)"], "--partition"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node is -1"),
        (["--nodes", "two"], "--nodes"),
        (["other.yaml"], "2 specs: give one, or --array"),
        (["--array", "same.yaml"], "run.yaml and same.yaml write to one directory: "),
        (["--array", "./run.yaml"], "run.yaml and run.yaml write to one directory: run0: give each its own"),
        (["--array", "nothing.yaml"], "no such file: nothing.yaml"),
        (["--array", "two\nlines.yaml"], r"control characters"),
        (["--array", "\udcff.yaml"], "UTF-8"),
    ],
)
def test_what_makes_no_job_is_one_line(
    command: Command, specs: Callable[..., list[str]], tmp_path: Path, options: list[str], said: str
) -> None:
    specs("run.yaml", "two\nlines.yaml", "\udcff.yaml", "other.yaml")
    specs("same.yaml", output_dir=str(tmp_path / "x" / ".." / "run0"))
    done = command("slurm", "run.yaml", *options)
    assert (done.code, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "gpus"), [("cpu", 1), ("cuda", 0), ("cuda:1", 2)], ids=["GPUs idle", "no GPU", "one GPU for two ranks"]
)
def test_a_device_that_does_not_fit_the_gpus_is_refused(
    command: Command, specs: Callable[..., list[str]], device: str, gpus: int
) -> None:
    done = command("slurm", *specs("run.yaml", device=device), "--gpus-per-node", gpus)
    assert (done.code, done.stdout) == (2, "")
    assert f"training.device is {device}, and the job has {gpus} GPUs a node: run.yaml: " in done.stderr


def test_the_script_is_written_once_and_replaced_when_asked(command: Command, specs: Callable[..., list[str]]) -> None:
    specs("run.yaml")
    script = command("slurm", "run.yaml").stdout
    written = command("slurm", "run.yaml", "--output", "a job.sh")
    assert (written.code, written.stdout) == (0, "written: sbatch 'a job.sh'\n")
    assert Path("a job.sh").read_text() == script
    refused = command("slurm", "run.yaml", "--nodes", 2, "--output", "a job.sh")
    assert (refused.code, refused.stdout) == (5, "")
    assert refused.stderr == "error: exists: a job.sh: choose another output, or pass --overwrite\n"
    assert Path("a job.sh").read_text() == script
    replaced = command("slurm", "run.yaml", "--nodes", 2, "--output", "a job.sh", "--overwrite", "--json")
    result = json.loads(replaced.stdout)
    assert result == {"output": "a job.sh", "script": Path("a job.sh").read_text()}
    assert "--nodes=2" in result["script"]
    assert json.loads(command("slurm", "run.yaml", "--json").stdout) == {"output": None, "script": script}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:05", 131_405),
        ("0-0:0:1", 1),
    ],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: int) -> None:
    assert SlurmOptions([Path("run.yaml")], time=text).time_s == seconds


def test_a_time_limit_of_nothing_means_none_to_slurm_and_no_signal_would_come() -> None:
    with pytest.raises(SpecError):
        SlurmOptions([Path("run.yaml")], time="0-0")

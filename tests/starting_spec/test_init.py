"""``init``: the spec that it writes is valid, fits by the memory plan, and says why; what does not fit is exit 5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.formats.prepared import read_lengths
from llamatune.memory.planned_run import plan_of_run
from llamatune.shapes.known_gpus import KNOWN_GPUS, known_gpu
from llamatune.shapes.presets import preset
from llamatune.spec import build_spec, load_spec
from llamatune.starting_spec.choosing import Device, choose
from llamatune.starting_spec.commented_yaml import commented_spec
from llamatune.starting_spec.row_lengths import RowLengths
from llamatune.strict_yaml import parse_yaml

Command = Callable[..., Any]
GIB = 1 << 30


def rows_of(tokens: int, count: int = 400, raw: bool = True) -> RowLengths:
    lengths = (tokens,) * count
    return RowLengths(lengths, lengths, Path("prepared/rows"), "test", tokens if raw else None)


def chosen_for(
    name: str, gpu: str, memory: int | None = None, tokens: int = 512, overrides: tuple[str, ...] = ()
) -> Any:
    known = known_gpu(gpu)
    device = Device(gpu, known.capability, memory or known.memory_bytes or 0)
    return choose("models/base", preset(name), rows_of(tokens), device, "runs/x", overrides)


@pytest.mark.parametrize("gpu", sorted(KNOWN_GPUS))
def test_a_7b_fits_every_gpu_in_what_it_can_compute(gpu: str) -> None:
    made = chosen_for("llama-2-7b", gpu)
    spec, old = made.spec, known_gpu(gpu).capability < (8, 0)
    assert spec.training.precision == ("fp16" if old else "bf16")
    assert spec.model.dtype in ("nf4", "float16" if old else "bfloat16")
    assert made.plan.fits
    assert made.plan.step.peak <= made.device.memory_bytes * 9 // 10
    assert spec.training.micro_batch_size * spec.training.gradient_accumulation_steps == 8
    config, rows = preset("llama-2-7b"), made.rows
    limit = made.device.memory_bytes * 9 // 10
    placed, again = plan_of_run(spec, config, rows.lengths, rows.targets, made.device.gpu, limit)
    assert placed.model.placement == "device"
    assert again.step == made.plan.step


def test_less_memory_means_fewer_bits_then_shorter_rows_then_host_memory() -> None:
    made = [chosen_for("llama-2-7b", "a100", size * GIB // 4, tokens=4096) for size in range(96, 12, -4)]
    stages = [
        (one.spec.model.placement == "host", one.spec.model.dtype == "nf4", one.rows.cut > 0,
         len(one.spec.lora.target_modules) == 2) for one in made
    ]  # fmt: skip
    assert stages[0] == (False, False, False, False)
    assert [stage for number, stage in enumerate(stages) if stage not in stages[:number]] == [
        (False, False, False, False),
        (False, True, False, False),
        (False, True, True, False),
        (False, True, True, True),
        (True, True, False, False),
    ]
    rows = [one.spec.training.micro_batch_size for one in made]
    assert rows[0] >= rows[-1]
    assert all(one.plan.fits for one in made)
    assert "16 bits" in next(one for one in made if one.spec.model.dtype == "nf4").reasons["model.dtype"]


def test_prepared_rows_are_not_cut() -> None:
    device = Device("x", (8, 0), 9 * GIB // 2)
    made = choose("m", preset("llama-2-7b"), rows_of(2048, raw=False), device, "runs/x", ())
    assert (made.spec.model.placement, made.rows.cut) == ("host", 0)
    assert made.rows.max_seq_length is None


@pytest.mark.parametrize("gpu", ["v100", "a100-80gb", "rtx-4090"])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.2-1b", "qwen3-8b"])
def test_the_text_reads_back_as_what_was_chosen(name: str, gpu: str) -> None:
    made = chosen_for(name, gpu)
    text = commented_spec(made, "llamatune prepare-data rows.jsonl", None)
    assert build_spec(parse_yaml(text, "init"), "init") == made.spec
    lines = text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=llamatune.schema.json"
    assert all(len(line) <= 120 for line in lines)
    for section, values in made.values.items():
        for key in values:
            (place,) = (number for number, line in enumerate(lines) if line.startswith(f"  {key}: "))
            assert made.reasons[f"{section}.{key}"]
            assert "#" in lines[place] or lines[place - 1].startswith("  # ")


def test_overrides_are_kept_and_planned_with() -> None:
    given = (
        "lora.r=64",
        "training.max_steps=10",
        "training.micro_batch_size=2",
        "model.dtype=nf4",
        "lora.lora_alpha=8",
    )
    made = chosen_for("llama-2-7b", "a100", overrides=given)
    spec = build_spec(parse_yaml(commented_spec(made, None, None), "init"), "init")
    assert (spec.lora.r, spec.lora.alpha, spec.training.max_steps, spec.model.dtype) == (64, 8, 10, "nf4")  # type: ignore[union-attr]
    assert spec.training.num_epochs is None
    assert spec.training.micro_batch_size == 2
    assert made.reasons["lora.r"] == made.reasons["lora.alpha"] == "as you chose"
    whole = chosen_for("llama-3.2-1b", "a100-80gb", overrides=("lora=null",))
    assert whole.spec.lora is None
    assert whole.spec.model.dtype == "float32"
    assert "lora" not in parse_yaml(commented_spec(whole, None, None), "init")


def test_what_fits_nowhere_is_exit_5_with_what_would(command: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(__file__).parents[2] / "examples/7b/config.json").read_text())
    done = command("init", "--model", tmp_path, "--data", tmp_path / "rows.jsonl", "--gpu", "t4", "--memory", "500MiB")
    assert (done.code, done.stdout) == (5, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: nothing fits: a step needs about ")
    assert "GiB" in error
    assert "lowest: " in error


def test_plan_memory_says_the_same_of_what_is_written(command: Command, tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "examples" / "7b"
    for gpu, size in (("a100", "24GiB"), ("a100", "10GiB"), ("a100-80gb", "80GiB")):
        file = tmp_path / f"{gpu}-{size}.yaml"
        words = ("init", "--model", model, "--data", "r.jsonl", "--gpu", gpu, "--memory", size, "--output", file)
        made = json.loads(command(*words, "--json").stdout)
        planned = json.loads(command("plan-memory", file, "--memory", size, "--json").stdout)
        assert planned["fits"]
        assert planned["predicted_memory_bytes"] == made["predicted_memory_bytes"]


@pytest.fixture
def workplace(tmp_path: Path, small_base: Path, tiny_rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_base, "base")
    rows = [json.loads(line) for line in tiny_rows.read_text().splitlines()]
    Path("my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["completion"]))
    return tmp_path


def test_the_commands_of_its_comments_lead_to_a_run(command: Command, workplace: Path) -> None:
    done = command("init", "--model", "base", "--data", "my rows.jsonl", "--gpu", "cpu", "--output", "run.yaml")
    assert done.code == 0, done.stderr
    text = Path("run.yaml").read_text()
    import shlex

    prepare = next(line for line in text.splitlines() if line.startswith("# Before: ")).removeprefix("# Before: ")
    assert prepare in done.stdout
    assert command(*shlex.split(prepare)[1:], "--json").code == 0
    spec = load_spec(Path("run.yaml"))
    lengths, _ = read_lengths(Path(spec.data.train))  # type: ignore[arg-type]
    assert max(lengths) <= int(shlex.split(prepare)[shlex.split(prepare).index("--max-seq-length") + 1])
    dry = command("train", "run.yaml", "--dry-run", "--json")
    assert dry.code == 0, dry.stderr
    assert json.loads(dry.stdout)["memory_plan"]["fits"]
    trained = command("train", "run.yaml", "training.max_steps=2", "training.num_epochs=null", "--json")
    assert trained.code == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 2


def test_a_prepared_directory_needs_no_preparation(
    command: Command, workplace: Path, prepared: Callable[..., Path]
) -> None:
    data = prepared()
    done = command("init", "--model", "base", "--data", data, "--gpu", "cpu", "--json")
    facts = json.loads(done.stdout)
    assert (done.code, facts["prepare"], facts["max_seq_length"]) == (0, None, None)
    lengths, targets = read_lengths(data)
    assert (facts["rows"], facts["longest_row_tokens"]) == (len(lengths), max(lengths))
    assert f"{sum(lengths):,} tokens, {sum(targets):,} of them targets" in " ".join(facts["spec"].split("\n# "))
    Path("made.yaml").write_text(facts["spec"])
    assert command("train", "made.yaml", "--dry-run").code == 0


def test_an_override_may_repeat_what_an_option_says(command: Command, workplace: Path) -> None:
    given = ("--model", "base", "--data", "my rows.jsonl", "--gpu", "cpu")
    for change in ("model.path=./base/", "data.train=./my rows.jsonl", "data.train=['my rows.jsonl']"):
        assert command("init", *given, change).code == 0, change


def test_measured_lengths_are_those_of_the_tokenizer(command: Command, workplace: Path) -> None:
    facts = json.loads(command("init", "--model", "base", "--data", "my rows.jsonl", "--gpu", "t4", "--json").stdout)
    command("prepare-data", "my rows.jsonl", "--tokenizer", "base", "--output", "whole", "--max-seq-length", "128")
    lengths, _ = read_lengths(Path("whole"))
    assert (facts["rows"], facts["longest_row_tokens"]) == (len(lengths), max(lengths))
    assert facts["max_seq_length"] % 64 == 0
    assert not Path("prepared").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--gpu", "a1000"), 2, "no GPU is called 'a1000' here"),
        (("--gpu", "8.6"), 2, "says nothing of the memory"),
        (("model.path=other", "--gpu", "t4"), 2, "model.path=other is another model than --model"),
        (("model={path: other}", "--gpu", "t4"), 2, "model.path=other is another model than --model"),
        (("data.train=elsewhere", "--gpu", "t4"), 2, "data.train=elsewhere is set by --data"),
        (("data={train: [a, b]}", "--gpu", "t4"), 2, "data.train=['a', 'b'] is set by --data"),
        (("training.device=cpu", "--gpu", "t4"), 2, "training.device=cpu, and the spec is planned for"),
        (("training.device=cuda:1", "--gpu", "cpu"), 2, "training.device=cuda:1, and the spec is planned for a CPU"),
        (("--memory", "24"), 2, "is no size"),
        (("lora.rank=8", "--gpu", "t4"), 2, "unknown key"),
        (("lora.r=8", "lora.r=4", "--gpu", "t4"), 2, "is given 2 times"),
        (("--model", "absent"), 4, "no such model directory"),
        (("--data", "absent.jsonl", "--gpu", "t4"), 3, "No such file"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    command: Command, workplace: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    given = [word for word in ("--model", "--data") if word not in words]
    values = {"--model": "base", "--data": "my rows.jsonl"}
    done = command("init", *words, *(part for word in given for part in (word, values[word])))
    assert (done.code, done.stdout, told in done.stderr) == (code, "", True), done.stderr


def test_a_bad_row_is_told_as_prepare_data_does(command: Command, workplace: Path) -> None:
    with Path("my rows.jsonl").open("a") as file:
        file.write('{"instruction": "x"}\n')
    done = command("init", "--model", "base", "--data", "my rows.jsonl", "--gpu", "t4")
    assert (done.code, "my rows.jsonl:" in done.stderr) == (3, True)


def test_without_a_gpu_the_memory_is_of_one_that_is_assumed(command: Command, workplace: Path) -> None:
    done = command("init", "--model", "base", "--data", "my rows.jsonl", "--memory", "1GiB")
    import torch

    if not torch.cuda.is_available():
        assert "planned for a GPU of compute capability 8.0" in done.stderr
        assert "precision: bf16" in done.stdout

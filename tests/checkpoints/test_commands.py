"""The two verbs on checkpoints, as a script sees them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch


def llamatune(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "llamatune", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


COUNTS = [
    ("llama-2-7b", "q_proj,v_proj", 6_738_415_616, 8_388_608),
    ("llama-2-7b", "all-linear", 6_738_415_616, 39_976_960),
    ("llama-2-13b", "q_proj,k_proj,v_proj,o_proj", 13_015_864_320, 26_214_400),
    ("llama-2-70b", "q_proj,v_proj", 68_976_648_192, 32_768_000),
    ("llama-3-8b", "all-linear", 8_030_261_248, 41_943_040),
    ("tinyllama-1.1b", "q_proj,k_proj,v_proj", 1_100_048_384, 3_063_808),
]


@pytest.mark.parametrize(("preset", "targets", "base", "adapter"), COUNTS)
def test_published_counts(preset, targets, base, adapter):
    done = llamatune("count-params", "--preset", preset, "--target-modules", targets, "--json")
    counts = json.loads(done.stdout)
    assert done.returncode == 0
    assert (counts["base_parameters"], counts["trainable_parameters"]) == (base, adapter)
    assert counts["total_parameters"] == base + adapter
    assert counts["trainable_percent"] == round(100 * adapter / (base + adapter), 4)
    assert counts["reduction_percent"] == round(100 * (1 - adapter / base), 2)


def test_counts_of_a_directory_and_an_adapter(tiny, tiny_meta, tiny_adapter):
    for path in (tiny[0], tiny_meta):
        done = llamatune("count-params", "--model", path, "--adapter", tiny_adapter, "--json")
        counts = json.loads(done.stdout)
        assert counts["base_parameters"] == sum(p.numel() for p in tiny[1].parameters())
        assert counts["trainable_parameters"] == 2 * 4 * ((32 + 32) + (16 + 32))
    human = llamatune("count-params", "--model", tiny[0], "--r", 4).stdout
    assert "trainable params: 896 || all params:" in human


@pytest.mark.parametrize("source", ["preset", "hf", "meta", "adapter"])
def test_counting_loads_no_torch(tiny, tiny_meta, tiny_adapter, source):
    where = {"preset": ("--preset", "llama-2-7b"), "hf": ("--model", tiny[0]), "meta": ("--model", tiny_meta),
             "adapter": ("--model", tiny[0], "--adapter", tiny_adapter)}[source]  # fmt: skip
    code = (
        "import sys\nfrom llamatune.cli import main\n"
        f"try: main({['count-params', *map(str, where)]!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'numpy', 'sentencepiece', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("count-params",), 2, "--model"),
        (("count-params", "--preset", "llama-2-7b", "--model", "x"), 2, "--model"),
        (("count-params", "--preset", "llama-9"), 2, "llama-2-7b"),
        (("count-params", "--preset", "llama-2-7b", "--target-modules", "lm_head"), 2, "q_proj"),
        (("count-params", "--preset", "llama-2-7b", "--target-modules", ""), 2, "--target-modules"),
        (("count-params", "--preset", "llama-2-7b", "--target-modules", "q_proj,"), 2, "--target-modules"),
        (("count-params", "--preset", "llama-2-7b", "--r", "0"), 2, "--r"),
        (("count-params", "--model", "absent"), 4, "no such model directory"),
        (("merge-lora", "--model", "absent", "--adapter", "x", "--output", "y"), 4, "no such model directory"),
        (("merge-lora", "--model", "x", "--adapter", "x", "--output", "y", "--dtype", "int8"), 2, "bfloat16"),
        (("merge-lora", "--model", "x"), 2, "--adapter"),
    ],
)
def test_mistakes_are_one_line(arguments, code, words):
    done = llamatune(*arguments, *(("--json",) if "--adapter" in arguments else ()))
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


def test_merge_and_its_report(tiny, tiny_adapter, tmp_path):
    arguments = ("merge-lora", "--model", tiny[0], "--adapter", tiny_adapter, "--output", tmp_path / "out")
    done = llamatune(*arguments, "--json", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"output", "tensors", "merged_tensors", "max_abs_error", "vanished_fraction"} <= report.keys()
    assert (report["merged_tensors"], report["output"]) == (4, str(tmp_path / "out"))
    assert "which base" in done.stderr
    again = llamatune(*arguments, "--dtype", "bfloat16")
    assert again.returncode == 0
    assert "already merged" in again.stdout
    assert llamatune(*arguments).returncode == 5


def without_override(*arguments):
    """The command as a user whom permissions bind; root would pass them by."""
    unprivileged = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv")
        dropped = "--bounding-set=-dac_override,-dac_read_search"
        unprivileged = ["setpriv", "--inh-caps=-all", dropped, "env", "-u", "HOME"]
    return subprocess.run(
        [*unprivileged, sys.executable, "-m", "llamatune", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["count-params", "merge-lora", "prepare-data"])
@pytest.mark.parametrize("closed", ["itself", "parent", "file", "adapter"])
@pytest.mark.parametrize("format_", ["hf", "meta"])
def test_a_missing_permission_is_the_environments_fault(
    tiny, tiny_meta, tiny_adapter, tiny_rows, tiny_tokenizer, tmp_path, verb, closed, format_
):
    inputs = tmp_path / "inputs"
    shutil.copytree(tiny[0] if format_ == "hf" else tiny_meta, inputs / "model")
    shutil.copytree(tiny_adapter, inputs / "adapter")
    shutil.copy(tiny_rows, inputs / "rows.jsonl")
    shutil.copy(tiny_tokenizer, inputs / "model" / "tokenizer.model")
    of_model = inputs / "model" / ("config.json" if format_ == "hf" else "params.json")
    places = {"itself": inputs / "model", "parent": inputs, "file": of_model, "adapter": inputs / "adapter"}
    if verb == "prepare-data":
        if format_ == "meta":
            pytest.skip("it reads no model")
        places.update(file=inputs / "model" / "tokenizer.model", adapter=inputs / "rows.jsonl")
    arguments = {
        "count-params": ("--model", inputs / "model", "--adapter", inputs / "adapter"),
        "merge-lora": ("--model", inputs / "model", "--adapter", inputs / "adapter", "--output", tmp_path / "out"),
        "prepare-data": (inputs / "rows.jsonl", "--tokenizer", inputs / "model", "--output", tmp_path / "out"),
    }[verb]
    mode = places[closed].stat().st_mode
    places[closed].chmod(0)
    try:
        done = without_override(verb, *arguments, "--json")
    finally:
        places[closed].chmod(mode)
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Permission denied" in done.stderr
    assert str(inputs) in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs"]


def test_an_output_that_may_not_be_entered(tiny, tiny_adapter, tmp_path):
    (tmp_path / "out").mkdir(mode=0)
    try:
        done = without_override(
            "merge-lora", "--model", tiny[0], "--adapter", tiny_adapter, "--output", tmp_path / "out"
        )
    finally:
        (tmp_path / "out").chmod(0o700)
    assert (done.returncode, done.stdout) == (5, "")
    assert "Permission denied" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_counting_a_meta_model_without_a_head_warns(tiny_meta, tmp_path):
    shutil.copytree(tiny_meta, tmp_path / "m")
    state = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    del state["output.weight"]
    torch.save(state, tmp_path / "m" / "consolidated.00.pth")
    done = llamatune("count-params", "--model", tmp_path / "m", "--json")
    whole = llamatune("count-params", "--model", tiny_meta, "--json")
    assert (done.returncode, whole.returncode, whole.stderr) == (0, 0, "")
    assert "no output.weight" in done.stderr
    assert json.loads(whole.stdout)["base_parameters"] - json.loads(done.stdout)["base_parameters"] == 96 * 32


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_torch_is_imported_ends_it_in_order(tiny, tiny_adapter, tmp_path, number):
    arguments = ["--model", tiny[0], "--adapter", tiny_adapter, "--output", tmp_path / "out"]
    child = subprocess.Popen(
        [sys.executable, "-m", "llamatune", "merge-lora", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    maps = f"/proc/{child.pid}/maps"
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        with open(maps) as file:
            if "libtorch" in file.read():  # the import has begun, and takes a while yet
                break
        time.sleep(0.005)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (75, ""), stderr
    assert stderr.splitlines()[-1].startswith("error: stopped")
    assert list(tmp_path.iterdir()) == []

"""The two verbs on checkpoints, as a script sees them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


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


@pytest.mark.parametrize("source", ["preset", "hf", "meta"])
def test_counting_loads_no_torch(tiny, tiny_meta, source):
    where = {"preset": ("--preset", "llama-2-7b"), "hf": ("--model", tiny[0]), "meta": ("--model", tiny_meta)}[source]
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
        (("count-params", "--preset", "llama-2-7b", "--r", "0"), 2, "--r"),
        (("count-params", "--model", "/nonexistent"), 4, "no such model directory"),
        (("merge-lora", "--model", "/nonexistent", "--adapter", "x", "--output", "y"), 4, "no such model directory"),
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

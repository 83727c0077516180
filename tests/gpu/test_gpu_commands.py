"""The commands on a GPU against the CPU: env, evaluate, generate; and runs that are killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from gpu_tools import relative_error
from run_tools import assert_same_outcome, metrics, spec_values

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import Sampling
from llamatune.inference.engine import complete
from llamatune.model.layers import linear

if TYPE_CHECKING:
    from conftest import Outcome

pytestmark = pytest.mark.gpu

PROMPTS = ["a red llama walks over", "nine blue apples while cold rain falls on seven old stones and", "green"]
IDS = [[1, 5, 30, 9, 77, 4, 12, 51], [1, 3], [1, 70, 11, 25, 90, 6, 6, 44, 19, 37, 89]]


def test_env_names_the_gpu(device: torch.device, command: Callable[..., Outcome]) -> None:
    done = command("env", "--json")
    assert done.code == 0
    found = json.loads(done.stdout)
    if device.type == "cuda":
        first = found["devices"][0]
        assert first["name"] == torch.cuda.get_device_name(0)
        assert first["supported"]
        assert first["memory_bytes"] == torch.cuda.get_device_properties(0).total_memory
        assert found["cuda"] == torch.version.cuda
    else:
        assert found["devices"] == []


def test_evaluate_is_that_of_the_cpu(
    device: torch.device, command: Callable[..., Outcome], tiny_base: Callable[..., Path], prepared: Callable[..., Path]
) -> None:
    reports = {}
    for where in (str(device), "cpu"):
        arguments = ("--device", where, "--dtype", "float32", "--json")
        done = command("evaluate", "--model", tiny_base(), "--data", prepared(), *arguments)
        assert done.code == 0, done.stderr
        reports[where] = json.loads(done.stdout)
    found, wanted = reports[str(device)], reports["cpu"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)  # some hundred sums in another order, in fp32
    assert found["target_tokens"] == wanted["target_tokens"]
    assert found["token_accuracy"] == pytest.approx(wanted["token_accuracy"], abs=2 / wanted["target_tokens"])


def test_greedy_text_is_that_of_the_cpu(
    device: torch.device, command: Callable[..., Outcome], tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    texts = []
    for where in (str(device), "cpu"):
        arguments = ("--device", where, "--dtype", "float32", "--temperature", "0", "--max-new-tokens", "40", "--json")
        done = command("generate", "--model", tiny_base(), "--prompt-file", prompts, *arguments)
        assert done.code == 0, done.stderr
        texts.append(json.loads(done.stdout)["results"])
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(6, 2, 8), (4, 4, 12)], ids=["grouped", "of 12"])
def test_decoding_with_a_cache_is_decoding_without(
    device: torch.device, tiny_base: Callable[..., Path], dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    """Each token that a batch of ragged prompts chose is the likeliest without a cache, up to rounding."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    model = load_model(tiny_base(**dict(zip(names, heads, strict=True))), dtype, device).eval()
    made = complete(model, IDS, Sampling(max_new_tokens=24, temperature=0), ())
    for prompt, completion in zip(IDS, made, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]], device=device)
        with torch.inference_mode():
            logits = model(ids, torch.arange(ids.shape[1], device=device)[None], read=linear)[0].double().cpu()
        chosen = logits[range(len(prompt) - 1, ids.shape[1] - 1), completion.ids]
        best = logits[len(prompt) - 1 : -1].amax(1)
        # Both logits of a pair are rounded in about thirty operations.
        allowed = 2 * 30**0.5 * torch.finfo(dtype).eps * float(logits.abs().amax())
        assert float((best - chosen).amax()) <= allowed
        assert len(completion.ids) == 24


def test_logits_are_those_of_the_cpu(device: torch.device, tiny_base: Callable[..., Path]) -> None:
    ids, base = torch.tensor([IDS[0] * 8]), tiny_base()
    positions = torch.arange(ids.shape[1])[None]
    found = load_model(base, torch.float32, device).eval()
    wanted = load_model(base, torch.float32).eval()
    with torch.inference_mode():
        ours = found(ids.to(device), positions.to(device), read=linear)
        assert relative_error(ours, wanted(ids, positions, read=linear)) <= 1e-5


class Runs:
    """Training runs of one spec by the command line, each in its own process."""

    def __init__(self, values: dict[str, Any], place: Path) -> None:
        self._spec, self._place = place / "run.yaml", place
        self._spec.write_text(yaml.safe_dump(values))

    def start(self, name: str) -> tuple[Path, subprocess.Popen[str]]:
        run = self._place / name
        command = [sys.executable, "-m", "llamatune", "train", str(self._spec), f"training.output_dir={run}"]
        environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return run, subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]

    def finish(self, name: str) -> Path:
        run, process = self.start(name)
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr[-2000:]
        return run

    def kill_after(self, name: str, lines: int) -> None:
        """Once so many lines of metrics, most of them steps, are there."""
        run, process = self.start(name)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") > lines:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert list((run / "checkpoints").glob("step-*"))


DETERMINISTIC: dict[str, dict[str, Any]] = {
    "bf16, Triton": {"model__dtype": "bfloat16", "training__precision": "bf16"},
    "NF4, 8-bit AdamW, recomputed": {
        "model__dtype": "nf4", "training__precision": "bf16", "training__optimizer": "adamw_8bit",
        "training__activation_checkpointing": "block", "training__kernels": "plain",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_equal_runs_and_a_killed_and_resumed_one_have_equal_bytes(
    device: torch.device, tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    changes = {"training__device": str(device), "training__deterministic": True, "training__num_epochs": 24,
               "training__save_every_steps": 12, **DETERMINISTIC[case]}  # fmt: skip
    runs = Runs(spec_values(tiny_base(), prepared(), tmp_path / "none", **changes), tmp_path)
    whole, again = runs.finish("whole"), runs.finish("again")
    assert_same_outcome(again, whole)
    runs.kill_after("killed", 40)
    resumed = runs.finish("killed")
    assert_same_outcome(resumed, whole)
    steps = [line["loss"] for line in metrics(whole, "step")]
    assert len(steps) > 80
    assert sum(steps[-4:]) < sum(steps[:4])

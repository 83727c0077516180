"""A run without memory to go on says what was held and which three changes of its spec would help, by how much."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_tools import make_spec, spec_values

from llamatune.data.batches import open_prepared
from llamatune.errors import EnvironmentFault, OutOfMemory
from llamatune.host_memory import free_host_bytes
from llamatune.memory.plan import heaviest_rows, plan_memory
from llamatune.memory.remedies import after_running_out
from llamatune.memory.sizes import Rows
from llamatune.out_of_memory import memory_faults
from llamatune.shapes.presets import PRESETS
from llamatune.spec import RunSpec, build_spec, load_spec

GIB = 1 << 30
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
SPEC_CHANGE = re.compile(r"(\w+\.[\w.]+=\S+)")

_LIMITED = """
import resource, sys
import llamatune.training.train
from llamatune.cli import main
from llamatune.host_memory import held_host_bytes
held = held_host_bytes()["mapped"]
resource.setrlimit(resource.RLIMIT_AS, (held + {more}, held + {more}))
main(["train", sys.argv[1], "--json"])
"""


def _remedies(message: str) -> list[tuple[str, float]]:
    """Each change that a message proposes, and the peak that it promises, in bytes."""
    found = []
    for part in message.split("; try ", 1)[1].split("; the last checkpoint")[0].split("; "):
        match = re.fullmatch(r"(.+) \(.+\): about ([\d.]+) (MiB|GiB)", part)
        assert match is not None, part
        found.append((match[1], float(match[2]) * (GIB if match[3] == "GiB" else GIB >> 10)))
    return found


def test_a_limit_on_the_process_ends_in_one_line_with_three_changes(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """A real lack of memory; the promised peaks are those that plan-memory computes for the changed specs."""
    changes = {"training__memory_limit": "4GiB", "training__micro_batch_size": 40, "training__max_steps": 1}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{number} old stones " * 20}) + "\n" for number in range(60)))
    path, data = tmp_path / "run.yaml", prepared(rows=rows, max_seq_length=256)
    path.write_text(yaml.safe_dump(spec_values(tiny_base(**WIDE), data, tmp_path / "run", **changes)))
    code = _LIMITED.format(more=640 << 20)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"out of memory on cpu: [\d.]+ [MG]iB resident, [\d.]+ [MG]iB mapped, [\d.]+ [KMG]iB free", line)
    planned = _plan(load_spec(path), data)
    found = _remedies(line)
    assert len(found) == 3
    for change, promised in found:
        after = _plan(load_spec(path, SPEC_CHANGE.findall(change)), data)
        assert after < planned
        assert promised == pytest.approx(after, rel=0.01)


def _plan(spec: RunSpec, data: Path) -> int:
    from llamatune.checkpoints.model_directory import read_config
    from llamatune.memory.plan import limit_of

    train = open_prepared(data).train
    rows = heaviest_rows(train.lengths, train.target_counts, spec)
    return plan_memory(spec, read_config(Path(spec.model.path)), rows, False, limit_of(spec, None)).step.peak


def test_a_limit_on_the_process_is_room_that_is_not_there(tmp_path: Path) -> None:
    """``memory_limit: auto`` sees it."""
    code = "import resource; from llamatune.host_memory import *; held = held_host_bytes()['mapped'];"
    code += f"resource.setrlimit(resource.RLIMIT_AS, (held + {64 << 20},) * 2); print(free_host_bytes())"
    free = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 32 << 20 < free <= 64 << 20
    assert free < free_host_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_device_that_is_full_tells_allocated_from_reserved(
    fault: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in (("memory_allocated", 3 * GIB), ("memory_reserved", 5 * GIB), ("mem_get_info", (GIB, 8 * GIB))):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    with pytest.raises(OutOfMemory) as raised, memory_faults(torch.device("cuda:0"), lambda: "do less"):
        raise fault
    assert str(raised.value) == (
        "out of memory on cuda:0: 3.00 GiB allocated, 5.00 GiB reserved, 1.00 GiB of 8.00 GiB free: do less"
    )


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle )`"),
    ],
)
def test_any_other_failure_of_cuda_is_one_line_too(fault: RuntimeError) -> None:
    reason = str(fault).splitlines()[0].removeprefix("CUDA error: ")
    with pytest.raises(EnvironmentFault) as raised, memory_faults(torch.device("cuda:0"), "do less"):
        raise fault
    assert not isinstance(raised.value, OutOfMemory)
    assert str(raised.value).startswith(f"CUDA failed: {reason}: cuda:0: run the same command again")
    assert "\n" not in str(raised.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_faults(torch.device("cpu"), ""):
        raise RuntimeError("shape mismatch")


def test_memory_that_does_not_suffice_for_advice_still_ends_in_one_line() -> None:
    def advice() -> str:
        raise MemoryError

    with (
        pytest.raises(OutOfMemory, match=r"out of memory on cpu: .* free$"),
        memory_faults(torch.device("cpu"), advice),
    ):
        raise MemoryError


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    training=st.fixed_dictionaries(
        {
            "micro_batch_size": st.sampled_from([1, 2, 5]),
            "optimizer": st.sampled_from(["adamw", "adamw_8bit", "sgd"]),
            "precision": st.sampled_from(["fp32", "bf16"]),
            "fused": st.booleans(),
            "activation_checkpointing": st.sampled_from(["none", "block", "every_2", "attention"]),
        }
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "nf4"]),
    lora=st.sampled_from([None, {"r": 16}, {"r": 8, "target_modules": "all-linear"}]),
    limit=st.sampled_from([None, 12 * GIB, 20 * GIB]),
    cuda=st.booleans(),
)
def test_whatever_the_spec_of_an_adapter_there_are_three_changes_that_lower_the_peak(
    training: dict[str, Any], dtype: str, lora: dict[str, Any] | None, limit: int | None, cuda: bool
) -> None:
    if lora is None:
        dtype = "float32"
    model = {"path": "x", "dtype": dtype}
    values: dict[str, Any] = {"model": model, "data": {"train": "x"}, "training": {"output_dir": "x", **training}}
    spec = build_spec(values | ({"lora": lora} if lora else {}), "test")
    rows = Rows((512,) * training["micro_batch_size"], 200 * training["micro_batch_size"])
    plan = plan_memory(spec, PRESETS["llama-2-7b"], rows, cuda, limit)
    found = _remedies(after_running_out(spec, PRESETS["llama-2-7b"], plan, cuda))
    smallest = dtype == "nf4" and training["activation_checkpointing"] == "block"
    assert len(found) == 3 or lora is None or smallest
    assert found
    assert len({change for change, _ in found}) == len(found)
    for _, promised in found:
        assert promised < plan.step.peak


def test_the_line_of_a_run_names_its_last_checkpoint(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamatune.training import loop
    from llamatune.training.train import train

    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", training__save_every_steps=1)
    update, calls = loop.make_update, []

    def update_twice(learner: Any, *more: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        return update(learner, *more)

    monkeypatch.setattr(loop, "make_update", update_twice)
    with pytest.raises(OutOfMemory, match=r"the last checkpoint is .*run/checkpoints/step-0*2$"):
        train(spec)

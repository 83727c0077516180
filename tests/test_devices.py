"""What is chosen, prepared and refused on GPUs, by what torch says of them: no GPU is needed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from listed_gpus import CU126, H100, T4, V100, Gpus
from torch.utils._python_dispatch import TorchDispatchMode

from llamatune import cli, devices
from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import ModelSource
from llamatune.devices import choose_device, find_device
from llamatune.errors import EnvironmentFault, SpecError
from llamatune.events import Notice, ignore_event
from llamatune.inference.model_source import open_model
from llamatune.spec import build_spec
from llamatune.training.inputs import open_inputs
from llamatune.training.precision import check_precision


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_without_kernels_is_refused_with_the_build_to_install(gpus: Gpus, name: str) -> None:
    gpus(V100, H100)
    with pytest.raises(
        EnvironmentFault,
        match=r"V100.*7\.0; torch .* only for sm_75.*install torch 2\.10 to 2\.14 built for CUDA 12\.6",
    ) as told:
        choose_device(name)
    assert "\n" not in str(told.value)
    assert choose_device("cuda:1") == torch.device("cuda:1"), "each device is judged by itself"


def test_a_gpu_newer_than_the_build_wants_a_newer_build(gpus: Gpus) -> None:
    gpus(("NVIDIA B200", (10, 0)), architectures=CU126, cuda="12.6")
    with pytest.raises(EnvironmentFault, match=r"10\.0.*install torch 2\.11 or later built for CUDA 13\.0: pip "):
        choose_device("auto")
    gpus(V100, architectures=CU126, cuda="12.6")
    devices.capability_of.cache_clear()
    assert choose_device("auto").type == "cuda"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "absent", "--prompt", "x", "--device", "cuda"],
        ["evaluate", "--model", "absent", "--data", "absent"],
        ["train", "SPEC"],
    ],
)
def test_verbs_refuse_it_on_one_line(
    gpus: Gpus, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    gpus(V100)
    spec = tmp_path / "run.yaml"
    spec.write_text("model: {path: absent}\nlora: {}\ndata: {train: absent}\ntraining: {output_dir: out}\n")
    with pytest.raises(SystemExit) as left:
        cli.main([str(spec) if word == "SPEC" else word for word in arguments])
    assert left.value.code == 5
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("error: Tesla V100-SXM2-16GB has compute capability 7.0")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_of_a_node_takes_its_own_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpus(T4, H100)
    assert [choose_device(name, local_rank=rank) for rank in (0, 1)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert chosen == [torch.device("cuda:0"), torch.device("cuda:1")], "NCCL takes CUDA's current device"
    with pytest.raises(EnvironmentFault, match="CUDA offers 2 GPUs to at least 3 ranks of this node: start one rank"):
        choose_device(name, local_rank=2)
    assert choose_device(name) == torch.device("cuda"), "one process takes CUDA's default"
    assert len(chosen) == 2


def test_the_one_gpu_that_a_scheduler_shows_is_taken_whatever_the_rank(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    gpus(H100)
    assert {choose_device("auto", local_rank=rank) for rank in range(4)} == {torch.device("cuda:0")}


def test_the_ranks_of_a_node_cannot_share_a_named_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    gpus(T4, H100)
    assert choose_device("cuda:1", local_rank=0) == torch.device("cuda:1"), "it may be the node's only rank"
    with pytest.raises(SpecError, match="a GPU each, not one: device cuda:1: use auto or cuda"):
        choose_device("cuda:1", local_rank=1)


def test_ranks_compute_on_the_cpu_as_one_process_does(gpus: Gpus) -> None:
    gpus(H100)
    assert choose_device("cpu", local_rank=1) == torch.device("cpu")
    gpus(fault="no driver")
    assert choose_device("auto", local_rank=1) == torch.device("cpu")


def test_what_computes_on_cuda_has_growing_segments_and_no_cudnn_attention(
    gpus: Gpus, tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    asked = gpus(T4, H100)
    values = {
        "model": {"path": str(tiny_base())},
        "lora": {},
        "data": {"train": str(prepared())},
        "training": {"output_dir": str(tmp_path / "run"), "device": "cuda:1"},
    }
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert torch.backends.cuda.cudnn_sdp_enabled(), "the benchmark's parent computes nothing"
    assert open_inputs(build_spec(values, "test"), False, ignore_event).device == torch.device("cuda:1")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert asked
    assert {setting for _, setting in asked} == {"expandable_segments:True"}, "CUDA starts with the first question"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_settings_of_the_user_stay(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpus(H100)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    choose_device("cuda")
    found = [os.environ.get(other) for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    assert sorted(found, key=str) == [None, "max_split_size_mb:512"]


def test_a_gpu_that_has_started_is_left_as_it_is(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(H100)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    choose_device("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(
    ("fault", "driver", "expected"),
    [
        ("Found no NVIDIA driver on your system. Please check\nmore", None, "(Found no NVIDIA driver on your system)"),
        ("CUDA unknown error - this may be due to", (13, 0), "(CUDA unknown error - this may be due to)"),
        ("The NVIDIA driver is too old", (12, 4), "knows CUDA only up to 12.4; update it, or install torch"),
        ("The NVIDIA driver is too old", (11, 4), "knows CUDA only up to 11.4; update it to release 580 or later"),
    ],
)
def test_auto_says_why_it_takes_the_cpu(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, fault: str, driver: tuple[int, int] | None, expected: str
) -> None:
    gpus(fault=fault)
    monkeypatch.setattr(devices, "driver_version", lambda: driver)
    told: list[Any] = []
    assert choose_device("auto", told.append) == torch.device("cpu")
    assert [notice.kind for notice in told] == ["warning"]
    assert expected in told[0].message
    with pytest.raises(EnvironmentFault, match="no device cuda; CUDA offers 0 "):
        choose_device("cuda")
    assert choose_device("cpu", told.append) == torch.device("cpu")
    assert len(told) == 1, "who asks for the CPU wants no word of GPUs"


def test_a_torch_without_cuda_takes_the_cpu_without_a_word() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    told: list[Any] = []
    assert choose_device("auto", told.append) == torch.device("cpu")
    assert not told
    assert devices.cuda_fault() is None


def test_a_gpu_that_does_not_start_is_one_line(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(H100)

    def busy(device: Any = None) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "get_device_capability", busy)
    with pytest.raises(EnvironmentFault, match=r"CUDA does not start: CUDA-capable.* unavailable: cuda"):
        choose_device("auto")


def test_bf16_is_the_matter_of_the_device_that_computes(
    gpus: Gpus, tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(H100, T4)
    values: dict[str, Any] = {"model": {"path": "x"}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "precision": "bf16"}}, "test")
    check_precision(spec, torch.device("cuda:0"), ignore_event)
    with pytest.raises(EnvironmentFault, match="Tesla T4 has no bf16"):
        check_precision(spec, torch.device("cuda:1"), ignore_event)
    for device, count in (("cuda:0", 0), ("cuda:1", 1)):
        told: list[Any] = []
        open_model(ModelSource(tiny_base(), dtype="bfloat16", device=device), told.append)
        assert len([event for event in told if isinstance(event, Notice) and "no bf16" in event.message]) == count


class Casts(TorchDispatchMode):
    """The dtypes that tensors of the CPU are cast to."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = (kwargs or {}).get("dtype")
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and wanted != args[0].dtype:
            self.on_cpu.append(wanted)
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_where_they_will_compute(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamatune.checkpoints.loading.is_finite", lambda tensor: True)  # meta holds no values
    load = functools.partial(load_model, tiny_base(), torch.bfloat16)
    with Casts() as casts:
        model = load("meta")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert not [dtype for dtype in casts.on_cpu if dtype is not None]
    with Casts() as casts:
        load("cpu")
    assert casts.on_cpu, "or the meter counts nothing"


def test_the_allocator_is_set_for_whoever_calls_from_python() -> None:
    code = (
        "import os\nfrom llamatune.devices import choose_device\n"
        "before = os.environ.get('PYTORCH_ALLOC_CONF')\nchoose_device('cpu')\nchoose_device('auto')\n"
        "print(before, os.environ.get('PYTORCH_ALLOC_CONF'))"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=inherited)
    assert done.stdout.split() == ["None", "expandable_segments:True"]

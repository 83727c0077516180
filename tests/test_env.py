"""What ``llamatune env`` says of GPUs, and the allocator's need of NVML."""

from __future__ import annotations

import json
import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from listed_gpus import CU130, H100, T4, V100, Gpus

from llamatune import cli, devices
from llamatune.devices import choose_device
from llamatune.errors import EnvironmentFault
from llamatune.model.kernels import choice


def told_by_env(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON, and the text as one line."""
    outputs = []
    for arguments in (["env", "--json"], ["env"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 0
        outputs.append(capsys.readouterr().out)
    return json.loads(outputs[0]), " ".join(outputs[1].split())


def test_env_tells_what_the_build_supports(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(V100, H100)
    monkeypatch.setattr(devices, "driver_version", lambda: (13, 1))
    monkeypatch.setattr(devices, "driver_release", lambda: "580.65.06")
    monkeypatch.setattr(choice, "kernel_fault", lambda device: None)
    told, text = told_by_env(capsys)
    assert (told["cuda_architectures"], told["cuda_driver"], told["cuda_fault"]) == (CU130, "13.1", None)
    assert (told["nvidia_driver"], told["allocator_fault"]) == ("580.65.06", None)
    assert "NVIDIA driver 580.65.06" in text
    facts = [(gpu["capability"], gpu["supported"], gpu["bf16"]) for gpu in told["devices"]]
    assert facts == [("7.0", False, False), ("9.0", True, True)]
    assert "cuda:0 cannot be used by this torch: install torch" in text
    assert "cuda:0: train with" not in text, "what does not run needs no advice but the build"
    assert "cuda:1 cannot" not in text
    of_v100, of_h100 = told["devices"]
    assert of_v100["install"].startswith("install torch 2.10 to 2.14 built for CUDA 12.6")
    assert of_v100["kernels"] is None, "no kernel can be tried"
    assert (of_h100["install"], of_h100["wheel"], of_h100["free_bytes"]) == (None, "CUDA 12.6 or later", 15 << 30)
    assert (of_h100["precision"], of_h100["dtype"], of_h100["kernels"][:6]) == ("bf16", "bfloat16", "triton")
    assert "cuda:1: train with training.precision: bf16, model.dtype: bfloat16 cuda:1: attention by Flash" in text
    assert "llamatune plan-memory run.yaml --memory 16GiB tells what fits" in text


@pytest.mark.parametrize(
    ("gpu", "fault", "expected"),
    [
        (T4, None, "plain (Triton kernels need compute capability 8.0)"),
        (H100, "no C compiler", "plain (Triton fails: no C compiler)"),
    ],
)
def test_env_tells_why_kernels_are_plain(
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpu: tuple[str, tuple[int, int]],
    fault: str | None,
    expected: str,
) -> None:
    gpus(gpu)
    monkeypatch.setattr(choice, "kernel_fault", lambda device: fault)
    told, text = told_by_env(capsys)
    assert told["devices"][0]["kernels"] == expected
    assert f"kernels {expected}" in text


def test_env_tells_of_a_busy_gpu_too(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(H100)

    def busy(device: Any = None) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    for name, cause in (("mem_get_info", busy), ("synchronize", busy)):
        monkeypatch.setattr(torch.cuda, name, cause)
    told, text = told_by_env(capsys)
    assert told["devices"][0]["free_bytes"] is None
    assert told["devices"][0]["kernels"].startswith("plain (Triton fails: ")
    assert "16.00 GiB cuda:0: train" in text


@pytest.mark.parametrize(
    ("cuda", "driver", "gpu", "expected"),
    [
        (None, (12, 4), H100, "install torch 2.10 to 2.14 built for CUDA 12.6: pip install"),
        (None, (13, 0), T4, "install torch 2.11 or later built for CUDA 13.0: pip install 'torch>=2.11'"),
        ("13.0", (12, 4), V100, "install torch 2.10 to 2.14 built for CUDA 12.6: pip install"),
        ("13.0", (11, 4), T4, "update the NVIDIA driver to release 580 or later, then install torch 2.11"),
        ("13.0", (13, 0), V100, "install torch 2.10 to 2.14 built for CUDA 12.6"),
        ("13.0", (13, 0), H100, None),
    ],
)
def test_env_tells_of_gpus_that_torch_does_not_find(
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cuda: str | None,
    driver: tuple[int, int],
    gpu: tuple[str, tuple[int, int]],
    expected: str | None,
) -> None:
    """As of a build without CUDA, an old driver, or a job that was given no GPU."""
    gpus(fault="no driver")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "driver_version", lambda: driver)
    monkeypatch.setattr(devices, "nvml", lambda: SimpleNamespace(gpus=lambda: [gpu], driver=lambda: "580"))
    told, text = told_by_env(capsys)
    (unused,) = told["unused_gpus"]
    assert (unused["name"], unused["capability"]) == (gpu[0], "{}.{}".format(*gpu[1]))
    assert unused["install"] == expected or (expected and unused["install"].startswith(expected))
    assert f"{gpu[0]} (compute capability {unused['capability']}) is in this machine and not used: " in text
    assert (expected or "this torch suits it, so it is not visible here") in text


NEEDING_NVML, BEFORE = "2.14.1+cu130", "2.11.0+cu130"


@pytest.mark.parametrize(("version", "grows"), [(NEEDING_NVML, False), ("2.12.0", False), (BEFORE, True)])
def test_without_nvml_segments_grow_only_where_torch_does_not_crash(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, grows: bool
) -> None:
    gpus(H100)
    monkeypatch.setattr(devices, "nvml", lambda: None)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(choice, "kernel_fault", lambda device: None)
    told: list[Any] = []
    assert choose_device("auto", told.append).type == "cuda"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if grows else None)
    expected = f"torch {version} needs NVML for expandable segments, and libnvidia-ml.so.1 cannot be used"
    assert [notice.message.partition(":")[0] for notice in told] == ([] if grows else [expected])
    facts, text = told_by_env(capsys)
    assert facts["allocator_fault"] == (None if grows else expected)
    assert (expected in text) is not grows


def test_a_setting_with_which_torch_would_crash_is_refused_where_there_is_a_gpu(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "nvml", lambda: None)
    monkeypatch.setattr(torch, "__version__", NEEDING_NVML)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    gpus(fault="no driver")
    assert choose_device("auto") == torch.device("cpu")
    gpus(H100)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(EnvironmentFault, match=r"needs NVML .*: PYTORCH_CUDA_ALLOC_CONF: unset it, or torch crashes"):
        choose_device("auto")
    monkeypatch.setattr(choice, "kernel_fault", lambda device: pytest.fail("a tensor on the GPU"))
    expected = "not tried, since torch would crash: unset PYTORCH_CUDA_ALLOC_CONF"
    assert told_by_env(capsys)[0]["devices"][0]["kernels"] == expected
    monkeypatch.setattr(torch, "__version__", BEFORE)
    assert choose_device("auto").type == "cuda"


def test_torch_says_nothing_of_a_fabric_that_older_gpus_lack(gpus: Gpus) -> None:
    gpus(T4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        choose_device("auto")
        warnings.warn("nvmlDeviceGetGpuFabricInfoV failed. This function is only supported on sm90+", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another"]

"""``llamatune env``: versions, devices and what they support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamatune import __version__
from llamatune.command_options.option import Options
from llamatune.commands._console import Console, RichConsole

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "safetensors", "sentencepiece", "tokenizers", "jinja2", "pydantic", "typer", "rich", "PyYAML")


def env(options: Options, console: Console) -> None:
    """Print versions, devices and what they support."""
    import importlib.metadata
    import platform

    import torch

    from llamatune import devices
    from llamatune.processor import core_count

    driver = devices.driver_version()
    gpus = [_gpu_facts(torch.device("cuda", index)) for index in range(devices.gpu_count())]
    payload = {
        "llamatune": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": core_count(),
        "memory_bytes": devices.memory_size_bytes(torch.device("cpu")),
        "cuda": torch.version.cuda,
        "cuda_architectures": torch.cuda.get_arch_list(),
        "cuda_driver": driver and "{}.{}".format(*driver),
        "cuda_fault": devices.cuda_fault(),
        "nvidia_driver": devices.driver_release(),
        "allocator_fault": devices.growth_fault(),
        "devices": gpus,
        "unused_gpus": [] if gpus else _unused_gpus(driver),
    }
    with console:
        console.result(payload, lambda out: _print(out, payload))


def _unused_gpus(driver: tuple[int, int] | None) -> list[dict[str, Any]]:
    """GPUs that the driver knows, where torch finds none; ``install``: what would use one, null if this torch would."""
    import torch

    from llamatune import devices
    from llamatune.shapes.torch_builds import build_for, has_kernels

    unused, cuda = [], torch.version.cuda
    for name, capability in devices.gpus_of_driver():
        is_new_enough = cuda is not None and driver is not None and driver[0] >= int(cuda.partition(".")[0])
        suits = is_new_enough and has_kernels(capability, torch.cuda.get_arch_list())
        install = None if suits else build_for(capability, driver)
        unused.append({"name": name, "capability": "{}.{}".format(*capability), "install": install})
    return unused


def _gpu_facts(gpu: torch.device) -> dict[str, Any]:
    """What the GPU is, whether this torch runs on it, and what to train with there."""
    import torch

    from llamatune import devices
    from llamatune.shapes.gpu_advice import advise
    from llamatune.shapes.torch_builds import build_for, has_kernels, wheel

    capability, memory_bytes = devices.capability_of(gpu), devices.memory_size_bytes(gpu)
    assert capability is not None, "it is a GPU"
    supported, advice = has_kernels(capability, torch.cuda.get_arch_list()), advise(capability, memory_bytes)
    return {
        "device": str(gpu),
        "name": torch.cuda.get_device_name(gpu),
        "memory_bytes": memory_bytes,
        "free_bytes": devices.free_gpu_bytes(gpu),
        "bf16": not devices.lacks_bf16(gpu),
        "capability": "{}.{}".format(*capability),
        "supported": supported,
        "wheel": wheel(capability),
        "install": None if supported else build_for(capability, devices.driver_version()),
        "precision": advice.precision,
        "dtype": advice.dtype,
        "dtype_for_7b": advice.dtype_for_7b,
        "attention": advice.attention,
        "kernels": _kernels(gpu) if supported else None,
        "lacks": advice.lacks,
    }


def _kernels(gpu: torch.device) -> str:
    """``triton 3.8.0``, or ``plain`` and why: found by running one."""
    from llamatune.devices import crashing_setting
    from llamatune.model.kernels.choice import chosen_kernels, kernel_fault, kernels_in_use, triton_runs_on

    if not triton_runs_on(gpu):
        return "plain (Triton kernels need compute capability 8.0)"
    setting = crashing_setting()
    if setting is not None:
        return f"not tried, since torch would crash: unset {setting}"
    fault = kernel_fault(gpu)
    if fault is not None:
        return f"plain (Triton fails: {fault})"
    with chosen_kernels("auto", gpu):
        return kernels_in_use()


def _print(out: RichConsole, facts: dict[str, Any]) -> None:
    from llamatune.units import gibibytes

    out.print(f"llamatune {__version__}, Python {facts['python']}, {facts['platform']}")
    out.print(", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    out.print(f"cpu: {facts['cpu_cores']} cores, {facts['cpu_capability']}, {gibibytes(facts['memory_bytes'])}")
    if facts["cuda"]:
        driver = f"a driver for CUDA up to {facts['cuda_driver']}" if facts["cuda_driver"] else "no driver"
        architectures = ", ".join(facts["cuda_architectures"])
        out.print(f"torch for CUDA {facts['cuda']}, {driver}, kernels for {architectures}")
    if facts["nvidia_driver"]:
        out.print(f"NVIDIA driver {facts['nvidia_driver']}")
    for gpu in facts["devices"]:
        _print_gpu(out, gpu)
    if facts["devices"] and facts["allocator_fault"]:
        out.print(f"{facts['allocator_fault']}: more memory than is used may be reserved")
    if not facts["devices"]:
        out.print(f"no CUDA device ({facts['cuda_fault'] or 'torch was built without CUDA'})", soft_wrap=True)
    for gpu in facts["unused_gpus"]:
        todo = gpu["install"] or "this torch suits it, so it is not visible here (CUDA_VISIBLE_DEVICES, Slurm's --gpus)"
        here = f"{gpu['name']} (compute capability {gpu['capability']}) is in this machine and not used"
        out.print(f"{here}: {todo}", soft_wrap=True)


def _print_gpu(out: RichConsole, gpu: dict[str, Any]) -> None:
    from llamatune.units import gibibytes

    device, free = gpu["device"], gpu["free_bytes"]
    size = gibibytes(gpu["memory_bytes"]) + ("" if free is None else f" ({gibibytes(free)} free)")
    out.print(f"{device}: {gpu['name']}, compute capability {gpu['capability']}, {size}")
    if not gpu["supported"]:
        out.print(f"{device} cannot be used by this torch: {gpu['install']}", soft_wrap=True)
        return
    dtype, of_7b = gpu["dtype"], gpu["dtype_for_7b"]
    smaller = "" if of_7b == dtype else f" ({of_7b} for LLaMA-2-7B, which does not fit in 16 bits)"
    lacks = f"; lacks {', '.join(gpu['lacks'])}" if gpu["lacks"] else ""
    whole = f"{gpu['memory_bytes'] // 2**30}GiB"
    out.print(f"{device}: train with training.precision: {gpu['precision']}, model.dtype: {dtype}{smaller}")
    out.print(f"{device}: attention by {gpu['attention']}, kernels {gpu['kernels']}{lacks}")
    out.print(f"{device}: llamatune plan-memory run.yaml --memory {whole} tells what fits")

"""``llamatune env``: versions, devices and what they support."""

from __future__ import annotations

import os
from typing import Any

from llamatune import __version__
from llamatune.command_options.option import Options
from llamatune.commands._console import Console, RichConsole

_PACKAGES = ("torch", "safetensors", "sentencepiece", "tokenizers", "pydantic", "typer", "rich", "PyYAML")


def env(options: Options, console: Console) -> None:
    """Print versions, devices and what they support."""
    import importlib.metadata
    import platform

    import torch

    from llamatune import devices

    driver, architectures = devices.driver_version(), torch.cuda.get_arch_list()
    gpus = [
        {
            "device": str(gpu),
            "name": torch.cuda.get_device_name(gpu),
            "memory_bytes": devices.memory_size_bytes(gpu),
            "bf16": not devices.lacks_bf16(gpu),
            "capability": "{}.{}".format(*capability),
            "supported": devices.has_kernels(capability, architectures),
        }
        for gpu in (torch.device("cuda", index) for index in range(devices.gpu_count()))
        if (capability := devices.capability_of(gpu))
    ]
    payload = {
        "llamatune": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": devices.memory_size_bytes(torch.device("cpu")),
        "cuda": torch.version.cuda,
        "cuda_architectures": architectures,
        "cuda_driver": driver and "{}.{}".format(*driver),
        "cuda_fault": devices.cuda_fault(),
        "devices": gpus,
    }
    with console:
        console.result(payload, lambda out: _print(out, payload))


def _print(out: RichConsole, facts: dict[str, Any]) -> None:
    from llamatune.devices import build_for
    from llamatune.units import gibibytes

    out.print(f"llamatune {__version__}, Python {facts['python']}, {facts['platform']}")
    out.print(", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    out.print(f"cpu: {facts['cpu_cores']} cores, {facts['cpu_capability']}, {gibibytes(facts['memory_bytes'])}")
    if facts["cuda"]:
        driver = f"a driver for CUDA up to {facts['cuda_driver']}" if facts["cuda_driver"] else "no driver"
        architectures = ", ".join(facts["cuda_architectures"])
        out.print(f"torch for CUDA {facts['cuda']}, {driver}, kernels for {architectures}")
    for gpu in facts["devices"]:
        bf16 = "with" if gpu["bf16"] else "without"
        details = f"compute capability {gpu['capability']}, {gibibytes(gpu['memory_bytes'])}, {bf16} bf16"
        out.print(f"{gpu['device']}: {gpu['name']}, {details}")
        if not gpu["supported"]:
            major, minor = map(int, gpu["capability"].split("."))
            out.print(f"{gpu['device']} cannot be used by this torch: {build_for((major, minor))}")
    if not facts["devices"]:
        out.print(f"no CUDA device ({facts['cuda_fault'] or 'torch was built without CUDA'})")

"""``llamatune env``: versions, devices and what they support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


def env(
    json_mode: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Print versions, devices and what they support."""
    import importlib.metadata
    import os
    import platform

    import torch

    from llamatune import __version__
    from llamatune.commands._console import Console
    from llamatune.devices import capability_of, lacks_bf16
    from llamatune.torch_build import build_for, cuda_fault, driver_version, gpu_count, has_kernels
    from llamatune.units import gibibytes

    packages = ("torch", "safetensors", "sentencepiece", "pydantic", "typer", "rich", "PyYAML")
    fault, driver, architectures = cuda_fault(), driver_version(), torch.cuda.get_arch_list()
    gpus = [torch.device("cuda", index) for index in range(gpu_count())]
    capabilities = [capability for gpu in gpus if (capability := capability_of(gpu))]
    total = [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus]
    devices = [
        {
            "device": str(gpu),
            "name": torch.cuda.get_device_name(gpu),
            "memory_bytes": size,
            "bf16": not lacks_bf16(gpu),
            "capability": "{}.{}".format(*capability),
            "supported": has_kernels(capability, architectures),
        }
        for gpu, size, capability in zip(gpus, total, capabilities, strict=True)
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: importlib.metadata.version(name) for name in packages}
    payload = {
        "llamatune": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "cuda": torch.version.cuda,
        "cuda_architectures": architectures,
        "cuda_driver": driver and "{}.{}".format(*driver),
        "cuda_fault": fault,
        "devices": devices,
    }
    with Console(json_mode, writes=False) as console:

        def human(out: RichConsole) -> None:
            out.print(f"llamatune {__version__}, Python {payload['python']}, {payload['platform']}")
            out.print(", ".join(f"{name} {version}" for name, version in versions.items()))
            out.print(f"cpu: {payload['cpu_cores']} cores, {payload['cpu_capability']}, {gibibytes(memory)}")
            if torch.version.cuda:
                known = f"a driver for CUDA up to {payload['cuda_driver']}" if driver else "no driver"
                out.print(f"torch for CUDA {torch.version.cuda}, {known}, kernels for {', '.join(architectures)}")
            for facts, size, capability in zip(devices, total, capabilities, strict=True):
                bf16 = "with" if facts["bf16"] else "without"
                details = f"compute capability {facts['capability']}, {gibibytes(size)}, {bf16} bf16"
                out.print(f"{facts['device']}: {facts['name']}, {details}")
                if not facts["supported"]:
                    out.print(f"{facts['device']} cannot be used by this torch: {build_for(capability)}")
            if not devices:
                out.print(f"no CUDA device ({fault or 'torch was built without CUDA'})")

        console.result(payload, human)

"""``llamatune env``: what this machine is."""

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
    from llamatune.units import gibibytes

    packages = ("torch", "safetensors", "sentencepiece", "pydantic", "typer", "rich", "PyYAML")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    total = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    devices = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "memory_bytes": total[index],
            "bf16": torch.cuda.get_device_capability(index) >= (8, 0),
        }
        for index in range(count)
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
        "devices": devices,
    }
    with Console(json_mode, writes=False) as console:

        def human(out: RichConsole) -> None:
            out.print(f"llamatune {__version__}, Python {payload['python']}, {payload['platform']}")
            out.print(", ".join(f"{name} {version}" for name, version in versions.items()))
            out.print(f"cpu: {payload['cpu_cores']} cores, {payload['cpu_capability']}, {gibibytes(memory)}")
            for index, facts in enumerate(devices):
                bf16 = "with" if facts["bf16"] else "without"
                out.print(f"cuda:{index}: {facts['name']}, {gibibytes(total[index])}, {bf16} bf16")
            if not devices:
                built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
                out.print(f"no CUDA device (torch was built {built})")

        console.result(payload, human)

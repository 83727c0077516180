"""Which builds of torch have kernels for a GPU, and which one to install. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.shapes.capabilities import Capability

Cuda = tuple[int, int]
"""A version of CUDA: of a build of torch, or the newest that a driver supports."""


@dataclass(frozen=True)
class Build:
    """Wheels of torch for one CUDA: of which releases, for which GPUs, and the command that installs them.

    Wheels for CUDA 12 run with every driver for CUDA 12 (release 525 or later), those for CUDA 13 with every one for
    CUDA 13 (580 or later). ``compute_capabilities`` are the least and the greatest major and minor version.
    """

    cuda: Cuda
    releases: str
    compute_capabilities: tuple[Capability, Capability]
    command: str

    def fits(self, capability: Capability, driver: Cuda | None) -> bool:
        """Whether it has kernels for the GPU and runs with a driver for this CUDA (None: any)."""
        oldest, newest = self.compute_capabilities
        return oldest <= capability <= newest and (driver is None or driver[0] >= self.cuda[0])

    def advice(self) -> str:
        """What to install, and how."""
        return f"install torch {self.releases} built for CUDA {self.cuda[0]}.{self.cuda[1]}: {self.command}"


_INDEX = "--index-url https://download.pytorch.org/whl"
_LATEST: Capability = (99, 0)
BUILDS = (
    Build((13, 0), "2.11 or later", ((7, 5), _LATEST), "pip install 'torch>=2.11'"),
    Build((12, 6), "2.10 to 2.14", ((5, 0), (9, 0)), f"pip install 'torch>=2.10,<2.15' {_INDEX}/cu126"),
    Build((12, 8), "2.10 or 2.11", ((7, 5), _LATEST), f"pip install 'torch>=2.10,<2.12' {_INDEX}/cu128"),
)
"""In the order in which they are advised. Of torch's release notes (RELEASE.md, support matrix of CUDA)."""

OLDEST_DRIVER: Cuda = (12, 0)
"""Of any build that is supported here."""

_JETSON: tuple[Capability, ...] = ((5, 3), (6, 2), (7, 2), (8, 7), (11, 0))
"""Nano, TX2, Xavier, Orin, Thor: their torch comes from NVIDIA."""


def has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether a build for these ``architectures`` (as in ``torch.cuda.get_arch_list``) runs on such a GPU.

    ``sm_86`` is machine code: for 8.6 and later ones of 8. ``compute_86`` is compiled by the driver: for 8.6 and all
    later ones. With an ``a`` either is for that one alone, with an ``f`` for its major version.
    """
    matches = (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in architectures)
    known = [match.groups() for match in matches if match]
    return not known or any(_covers(capability, *groups) for groups in known)


def _covers(capability: Capability, kind: str, major: str, minor: str, only: str) -> bool:
    built = (int(major), int(minor))
    if only == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (kind == "compute" and not only))


def wheel(capability: Capability) -> str:
    """The builds of torch that hold kernels for such a GPU, by their CUDA."""
    if capability in _JETSON:
        return "NVIDIA's own for Jetson"
    if capability >= (10, 0):
        return "CUDA 12.8 or later"
    if capability >= (7, 5):
        return "CUDA 12.6 or later"
    return "CUDA 12.6, torch 2.10 to 2.14" if capability >= (5, 0) else "none"


def fitting_build(capability: Capability, driver: Cuda | None = None) -> Build | None:
    """The build for such a GPU under such a driver; None: there is none, also not from NVIDIA."""
    return next((build for build in BUILDS if build.fits(capability, driver)), None)


def build_for(capability: Capability, driver: Cuda | None = None) -> str:
    """What to install for a GPU that the installed build does not support; ``driver`` None: not known."""
    if capability in _JETSON:
        return "install NVIDIA's build of torch for Jetson (https://developer.nvidia.com/embedded)"
    build = fitting_build(capability, driver)
    if build is not None:
        return build.advice()
    with_newer_driver = fitting_build(capability)
    if with_newer_driver is None:
        return "use a newer GPU"
    return f"update the NVIDIA driver to release 580 or later, then {with_newer_driver.advice()}"


def build_for_driver(driver: Cuda) -> str:
    """What to install where the driver is older than the installed build, and the GPU is not known."""
    older = [build.advice() for build in BUILDS if driver >= OLDEST_DRIVER and driver[0] >= build.cuda[0]]
    return f"update it, or {older[0]}" if older else "update it to release 580 or later"

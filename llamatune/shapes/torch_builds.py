"""Which builds of torch have kernels for a GPU, and which one to install. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llamatune.shapes.capabilities import Capability

CUDA_12_BUILD = (
    "install torch 2.10 to 2.14 built for CUDA 12.6 (https://pytorch.org/get-started/previous-versions has the command)"
)
"""The last builds that hold kernels for compute capabilities 5.0 to 7.0."""

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


def build_for(capability: Capability) -> str:
    """What to install for a GPU that the installed build does not support."""
    if capability in _JETSON:
        return "install NVIDIA's build of torch for Jetson (https://developer.nvidia.com/embedded)"
    if capability >= (7, 5):
        return f"install a build of torch for {wheel(capability)} (https://pytorch.org/get-started/locally)"
    return CUDA_12_BUILD if capability >= (5, 0) else "use a newer GPU"

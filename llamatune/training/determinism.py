"""``training.deterministic``: a GPU's deterministic kernels during a run, and what torch refuses with them on.

On a CPU equal runs give equal bytes in any case, and nothing is set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from llamatune.errors import EnvironmentFault

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")
"""The workspaces with which cuBLAS adds up in one order."""
_INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"
"""With it, compiled kernels are not chosen by their measured speed."""
_NO_KERNEL = " does not have a deterministic implementation"


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment within the block, unless the user has."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def cublas_workspace(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Within the block cuBLAS is started with a workspace for deterministic products; enter it before CUDA starts."""
    return _variable(_CUBLAS, _CUBLAS_VALUES[0]) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def deterministic_kernels(wanted: bool, device: torch.device) -> Iterator[None]:
    """On a GPU, have torch use deterministic kernels within the block, in all threads; the settings before come back.

    Raises:
        EnvironmentFault: the user's cuBLAS workspace is not deterministic, or torch has no deterministic kernel for
            what the block computes.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    off = "or set training.deterministic: false"
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with cublas_workspace(True), _variable(_INDUCTOR, "1"):
        if os.environ[_CUBLAS] not in _CUBLAS_VALUES:
            what = f"{_CUBLAS} is {os.environ[_CUBLAS]!r}, with which cuBLAS is not deterministic"
            raise EnvironmentFault(what, device, f"unset it, set it to {_CUBLAS_VALUES[0]}, {off}")
        try:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        except RuntimeError as fault:
            text = str(fault)
            if _CUBLAS in text:
                what, todo = f"cuBLAS was started without {_CUBLAS}", "set it to :4096:8 before Python starts"
            elif _NO_KERNEL in text:
                what = f"torch {torch.__version__} has no deterministic {text.partition(_NO_KERNEL)[0]}"
                todo = "use another torch"
            else:
                raise
            raise EnvironmentFault(what, device, f"{todo}, {off}") from fault
        finally:
            torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
            torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]

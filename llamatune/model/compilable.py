"""Functions that torch.compile may turn into one kernel each.

They are what lies between matrix products: norms, rotation, SwiGLU, cross-entropy, the unpacking of NF4. Eagerly every
line of them reads and writes memory once more. The products stay as they are, since they write in place; attention,
since its samples are ragged; and the autograd functions, since what they keep is chosen by hand, not by a partitioner.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_compiling = False


@contextlib.contextmanager
def compiling(wanted: bool = True) -> Iterator[None]:
    """Decide for all that is ``compilable``, in every thread: autograd has its own for a GPU."""
    global _compiling
    before, _compiling = _compiling, wanted
    try:
        yield
    finally:
        _compiling = before


def is_compiling() -> bool:
    """Whether functions run compiled now."""
    return _compiling


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)  # imports the compiler, some seconds


def compilable(function: F) -> F:
    """Let ``compiling`` decide how a function of tensors and constants runs.

    The last dimension but one of its tensors is rows, of which every call may have another number; the others are few.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not _compiling:
            return function(*args)
        return _compiled(function)(*(_with_any_rows(arg) if isinstance(arg, Tensor) else arg for arg in args))

    return run  # type: ignore[return-value]


def _with_any_rows(x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        x = x.detach()  # whether it needs a gradient makes no difference then, but would compile the function again
    if x.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
    return x

"""torch.compile of the elementwise functions between matrix products: norms, rotation, SwiGLU, cross-entropy, NF4.

Without it, every line of them reads and writes memory once more. Matrix products are not compiled, because they write
in place; nor is attention, because its samples differ in length; nor the autograd functions, because they choose by
hand what they keep.
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
    """Compile every ``compilable`` function, or none, in all threads: autograd has its own threads for a GPU."""
    global _compiling
    before, _compiling = _compiling, wanted
    try:
        yield
    finally:
        _compiling = before


def is_compiling() -> bool:
    """Whether ``compilable`` functions run compiled."""
    return _compiling


_compiled = functools.cache(torch.compile)
"""Called where it is needed: it imports the compiler, which takes some seconds."""


def compilable(function: F) -> F:
    """Run a function of tensors and constants compiled while ``compiling`` is on.

    The last dimension but one of its tensors is rows, whose number may differ at every call.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not _compiling:
            return function(*args)
        return _compiled(function)(*(_with_any_rows(arg) if isinstance(arg, Tensor) else arg for arg in args))

    return run  # type: ignore[return-value]


def _with_any_rows(x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        x = x.detach()  # requires_grad has no effect here, but would compile the function again
    if x.dim() > 1:
        torch._dynamo.maybe_mark_dynamic(x, x.dim() - 2)
    return x

"""Each plain function that names a kernel has one that can take its place, and each kernel has its plain function."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llamatune
from llamatune.model.kernels.choice import by_kernel, running_kernels

PACKAGE = Path(llamatune.__file__).parent
KERNELS = PACKAGE / "model" / "kernels"


def plain_functions() -> list[tuple[str, str]]:
    """Modules and names of the functions that are decorated with ``by_kernel``, found by reading the sources."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("by_kernel(" in ast.unparse(d) for d in node.decorator_list):
                found.append((module, node.name))
    return found


def kernel_of(function: Callable[..., Any]) -> Callable[..., Any]:
    file: str = function.kernel  # type: ignore[attr-defined]
    found: Callable[..., Any] = getattr(importlib.import_module(f"llamatune.model.kernels.{file}"), function.__name__)
    return found


@pytest.mark.parametrize(("module", "name"), plain_functions())
def test_the_kernel_has_the_same_parameters(module: str, name: str) -> None:
    """Names, order and defaults: both are called by position."""
    plain = getattr(importlib.import_module(module), name)

    def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(kernel_of(plain)) == parameters(plain)


def test_no_kernel_is_without_a_plain_function() -> None:
    plain = {(getattr(importlib.import_module(module), name).kernel, name) for module, name in plain_functions()}
    files = [path.stem for path in KERNELS.glob("*.py") if path.stem not in ("__init__", "choice")]
    assert files
    for file in files:
        module = importlib.import_module(f"llamatune.model.kernels.{file}")
        own = {
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
        assert own == {name for at, name in plain if at == file}, file


def test_each_plain_function_names_its_own_kernel() -> None:
    """Two plain functions of one kernel would be two specifications."""
    names = [(getattr(importlib.import_module(module), name).kernel, name) for module, name in plain_functions()]
    assert len(names) == len(set(names))


def test_the_first_argument_may_be_a_list() -> None:
    calls = []

    @by_kernel("swiglu")
    def swiglu(gate: list[torch.Tensor], up: torch.Tensor) -> None:
        calls.append(gate)

    with running_kernels("cuda"), torch.no_grad():
        swiglu([torch.ones(2)], torch.ones(2))  # on the CPU: the plain one
    assert len(calls) == 1

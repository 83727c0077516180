"""Fine-tune LLaMA models with LoRA, from the command line or from Python.

``import llamatune`` loads nothing; each name is loaded when it is first used. docs/python.md has examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llamatune import errors as errors
    from llamatune import events as events
    from llamatune.errors import CheckpointError as CheckpointError
    from llamatune.errors import DataError as DataError
    from llamatune.errors import EnvironmentFault as EnvironmentFault
    from llamatune.errors import LlamatuneError as LlamatuneError
    from llamatune.errors import NumericsError as NumericsError
    from llamatune.errors import OutOfMemory as OutOfMemory
    from llamatune.errors import SpecError as SpecError
    from llamatune.errors import Stopped as Stopped
    from llamatune.events import Event as Event
    from llamatune.python_api import evaluate as evaluate
    from llamatune.python_api import generate as generate
    from llamatune.python_api import load_spec as load_spec
    from llamatune.python_api import merge as merge
    from llamatune.python_api import plan_memory as plan_memory
    from llamatune.python_api import prepare as prepare
    from llamatune.python_api import train as train
    from llamatune.spec import RunSpec as RunSpec

_HOMES = {
    "python_api": ("load_spec", "prepare", "train", "generate", "evaluate", "merge", "plan_memory"),
    "spec": ("RunSpec",),
    "events": ("Event",),
    "errors": (
        *("LlamatuneError", "SpecError", "DataError", "CheckpointError"),
        *("EnvironmentFault", "OutOfMemory", "NumericsError", "Stopped"),
    ),
}
"""The module of each name; the modules ``events`` and ``errors`` are names too."""

__all__ = [  # noqa: PLE0604
    "__version__",
    "errors",
    "events",
    *(name for names in _HOMES.values() for name in names),
]


if not TYPE_CHECKING:  # a name that is not listed above is an error for a type checker too

    def __getattr__(name: str) -> Any:
        import importlib

        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"llamatune.{home}"), name)
            if name == home and name in __all__:
                return importlib.import_module(f"llamatune.{home}")
        raise AttributeError(f"module 'llamatune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

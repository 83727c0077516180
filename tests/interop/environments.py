"""Makes an environment for each judge in the cache: other programs and releases than those that the tests run with.

An environment sees the packages of those that it is made over, so torch is installed once. What is there is kept as
long as its packages are the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ.get("LLAMATUNE_INTEROP") or Path.home() / ".cache" / "llamatune-interop")
LLAMA_CPP = "llama-cpp-python==0.3.36"
os.environ.setdefault("CMAKE_ARGS", "-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1")
"""It is built from its source: without what sees pictures, and quickly rather than for speed."""
CONVERTERS = "converters"
"""The folder of llama.cpp's converters in its environment."""


@dataclass(frozen=True)
class Environment:
    """``packages`` as pip names them; ``over``: environments whose packages it sees too."""

    packages: tuple[str, ...]
    over: tuple[str, ...] = ()
    finish: Callable[[Path], None] = lambda path: None


def add_converters(path: Path) -> None:
    """llama.cpp's own converters, which are in the source of its Python binding alone."""
    pip(path, "download", "--no-deps", "--no-binary", ":all:", "--dest", path, LLAMA_CPP)
    [archive] = path.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as file:
        for member in file:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if name.startswith(("convert_", "conversion/", "gguf-py/")):
                file.extract(member.replace(name=name, deep=False), path / CONVERTERS, filter="data")
    archive.unlink()


ENVIRONMENTS = {
    "torch": Environment((f"torch=={version('torch').partition('+')[0]}", "numpy<2.5")),
    "tiktoken": Environment(("tiktoken",)),
    "transformers5": Environment(
        ("transformers==5.23.0", "peft==0.21.2", "sentencepiece", "protobuf", "jinja2", "gguf"), ("torch",)
    ),
    "transformers4": Environment(
        ("transformers==4.57.6", "peft==0.18.1", "sentencepiece", "protobuf", "jinja2", "gguf"), ("torch",)
    ),
    "lm-eval": Environment(("lm_eval==0.4.13", "accelerate"), ("torch", "transformers5")),
    "mlx": Environment(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "sentencepiece", "protobuf", "jinja2")),
    "llama.cpp": Environment((LLAMA_CPP,), ("torch", "transformers4"), add_converters),
}


def python_of(name: str) -> Path:
    return CACHE / "envs" / name / "bin" / "python"


def is_made(name: str) -> bool:
    """Whether the environment is there with the packages that it is declared with."""
    marker = CACHE / "envs" / name / "made"
    return marker.exists() and marker.read_text() == _declaration(name)


def make(name: str) -> None:
    """Make an environment, after those that it is made over."""
    environment, path = ENVIRONMENTS[name], CACHE / "envs" / name
    for other in environment.over:
        if not is_made(other):
            make(other)
    shutil.rmtree(path, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", path], check=True)
    packages = _packages_folder(path)
    seen = [f"import site; site.addsitedir({str(_packages_folder(CACHE / 'envs' / o))!r})" for o in environment.over]
    (packages / "over.pth").write_text("".join(line + "\n" for line in seen))
    pip(path, "install", *environment.packages)
    environment.finish(path)
    (path / "made").write_text(_declaration(name))


def pip(path: Path, *words: object) -> None:
    command = [path / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run([str(word) for word in command], check=True)


def _packages_folder(path: Path) -> Path:
    return path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _declaration(name: str) -> str:
    environment = ENVIRONMENTS[name]
    return "\n".join((*environment.packages, *map(_declaration, environment.over)))

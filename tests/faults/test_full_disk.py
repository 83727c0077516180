"""A disk that is full at a call of a verb that writes: one line with the file's path, whatever the verb writes."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from slow_cases import slow
from tracing import changing_calls, fault_options, injected, record_options
from warm import NO_STRACE, Warm, strace

pytestmark = pytest.mark.skipif(strace() is None, reason=NO_STRACE)

SPACE = re.compile(r"no space left for (one more name|[1-9][\d,]* bytes), [\d,]+ are free")
LINES: dict[str, str] = {
    "answers": "generate --model {base} --prompt-file {rows} --template gsm8k --temperature 0 --max-new-tokens 2 "
    "--output {place}/answers.jsonl --markdown {place}/answers.md",
    "gsm8k": "evaluate --model {base} --task gsm8k --data {rows} --max-new-tokens 2 --output {place}/answers.jsonl",
    "rows": "evaluate --model {base} --data {prepared} --per-row {place}/rows.jsonl",
    "judge": "judge {run} --limit 2 --choices {choices} --per-question {place}/questions.jsonl",
    "report": "report {run} --output {place}/report.html --tables {place}/tables",
    "schema": "schema --output {place}/schema.json",
    "init": "init --model {base} --data {prepared} --gpu t4 --output {place}/run.yaml",
    "convert": "convert --model {base} --output {place}/model.gguf",
    "convert-adapter": "convert-adapter --adapter {run}/adapter --model {base} --format mlx --output {place}/mlx",
    "extract-lora": "extract-lora --base {base} --tuned {merged} --r 2 --output {place}/lora",
}
EVERY = {"report": 5}
"""Of the calls so many-th is tried; of others each."""
QUICK = ("gsm8k", "schema")


@pytest.fixture(scope="module")
def names(
    warm: Warm,
    job_file: Callable[..., tuple[str, ...]],
    small_base: Path,
    prepared: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """What the lines read."""
    place = tmp_path_factory.mktemp("full")
    train = job_file(training__max_steps=1, training__num_epochs=None)
    found = {"base": small_base, "run": place / "run", "merged": place / "merged", "prepared": prepared(),
             "rows": place / "rows.jsonl", "choices": place / "choices.jsonl"}  # fmt: skip
    merge = ["merge-lora", "--model", str(small_base), "--adapter", f"{found['run']}/adapter"]
    for words in ([*train, f"training.output_dir={found['run']}"], [*merge, "--output", str(found["merged"])]):
        made = warm.run(words)
        assert made.code == 0, made.stderr
    questions = [{"question": f"{n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(3)]
    found["rows"].write_text("".join(json.dumps(row) + "\n" for row in questions))
    choice = {"question": "which?", "choices": list("abcd"), "answer": 1}
    found["choices"].write_text(2 * (json.dumps(choice) + "\n"))
    return found


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in LINES])
def test_a_full_disk_names_the_file(
    warm: Warm, names: dict[str, Path], tmp_path: Path, name: str, tell: Callable[[str], None]
) -> None:
    def line(place: Path) -> list[str]:
        place.mkdir()
        return [word.format(place=place, **names) for word in LINES[name].split()]

    log, codes, bad = tmp_path / "log", Counter[int](), []
    whole = warm.run(line(tmp_path / "whole"), tracing=record_options(), log=log)
    assert whole.code == 0, whole.stderr
    calls = changing_calls(log, tmp_path / "whole")
    assert calls
    for call in calls[:: EVERY.get(name, 1)]:
        ended = warm.run(line(tmp_path / "faulty"), tracing=fault_options(call, "ENOSPC"), log=log)
        codes[ended.code] += 1
        said = (ended.stderr.splitlines() or [""])[-1]
        assert injected(log), call.text
        if ended.code not in (0, 5) or "Traceback" in ended.stderr:
            bad.append(f"{call.text}: exit code {ended.code}: {ended.stderr[-400:]}")
        named = said.startswith("error: ") and str(tmp_path / "faulty") in said
        if ended.code == 5 and not (named and SPACE.search(said)):
            bad.append(f"{call.text}: {said}")
        shutil.rmtree(tmp_path / "faulty")
    tell(f"{name}: {codes.total()} of {len(calls)} calls, exit codes {dict(codes)}")
    assert not bad, "\n".join(bad)

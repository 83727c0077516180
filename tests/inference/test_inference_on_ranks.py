"""``evaluate`` and ``generate`` on several ranks: shared work, and to the byte what one process prints and writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_tools import launch, run_ranks, wait_for
from slow_cases import slow
from warm import Warm

Case = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]) -> list[str]:
    base = tiny_base()
    return ["--model", str(base), "--adapter", str(peft_adapter(base)), "--device", "cpu"]


@pytest.fixture(scope="module")
def evaluation(model: list[str], prepared: Callable[..., Path]) -> Case:
    data = prepared(validation_fraction=0.3)
    words = ["evaluate", *model, "--compare", "--data", str(data), "--split", "all", "--batch-size", "2", "--json"]
    return lambda place: [*words, "--per-row", str(place / "out.jsonl")]


@pytest.fixture(scope="module")
def generation(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Case:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"{number} llamas\n" for number in range(40)))
    words = ["generate", *model, "--prompt-file", str(prompts), "--max-new-tokens", "5", "--json"]
    words += ["--temperature", "1", "--num-return-sequences", "2", "--stop", "a"]
    return lambda place: [*words, "--output", str(place / "out.jsonl")]


@pytest.fixture(scope="module")
def questions(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Case:
    rows = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(17):
            file.write(json.dumps({"question": f"what is {number}?", "answer": f"just\n#### {number}"}) + "\n")
    words = ["evaluate", *model, "--compare", "--task", "gsm8k", "--data", str(rows), "--batch-size", "2", "--json"]
    return lambda place: [*words, "--max-new-tokens", "40", "--output", str(place / "out.jsonl")]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, evaluation: Case, generation: Case) -> Iterator[Warm]:
    scratch = tmp_path_factory.mktemp("warm")
    (scratch / "generated").mkdir()
    parent = Warm([evaluation(scratch), generation(scratch / "generated")], scratch)
    yield parent
    parent.close()


def outcome(warm: Warm, case: Case, place: Path, size: int, **how: Any) -> tuple[dict[str, Any], bytes]:
    """What was printed, without the speed, and what was written."""
    place.mkdir(exist_ok=True)
    result = json.loads(run_ranks(warm, case(place), size, **how).printed[0])
    result.pop("tokens_per_second", None)
    return result, (place / "out.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "rows"), [("evaluation", 46), ("generation", 40), ("questions", 17)])
def test_ranks_share_the_batches_and_come_to_the_same(
    warm: Warm, request: pytest.FixtureRequest, tmp_path: Path, name: str, rows: int
) -> None:
    case = request.getfixturevalue(name)
    expected = outcome(warm, case, tmp_path / "alone", 1)
    assert expected[1]
    for size in (2, 3):
        how = {"broken": "broken_ranks.log_inference", "environment": {"LOG_ROWS": str(tmp_path / f"rows-{size}")}}
        assert outcome(warm, case, tmp_path / f"on-{size}", size, **how) == expected
        logs = [(tmp_path / f"rows-{size}").with_suffix(f".{rank}") for rank in range(size)]
        counts = [sum(map(int, log.read_text().split())) for log in logs]
        assert sum(counts) == rows
        assert max(counts) - min(counts) <= 6


@pytest.mark.parametrize("name", ["evaluation", "generation", slow("questions")])
@pytest.mark.parametrize(("placement", "size"), [("host", 1), ("shard", 1), ("host", 2), ("shard", 3)])
def test_blocks_that_lie_elsewhere_come_to_the_same(
    warm: Warm, request: pytest.FixtureRequest, tmp_path: Path, name: str, placement: str, size: int
) -> None:
    case: Case = request.getfixturevalue(name)
    expected = outcome(warm, case, tmp_path / "device", 1)
    found = outcome(warm, lambda place: [*case(place), "--placement", placement], tmp_path / placement, size)
    assert found == expected


def test_a_stop_of_one_rank_ends_generation_in_slices(warm: Warm, generation: Case, tmp_path: Path) -> None:
    words = [*generation(tmp_path), "--placement", "shard"]
    words[words.index("--max-new-tokens") + 1] = "100000"
    log = tmp_path / "rows"
    launched = launch(warm, words, 2, broken="broken_ranks.log_inference", environment={"LOG_ROWS": str(log)})
    for rank in range(2):
        wait_for(log.with_suffix(f".{rank}"), "", launched)
    launched.signal(1, signal.SIGTERM)
    end = launched.ended()
    assert (len(set(end.codes)), end.printed, len(end.errors)) == (1, [], 1), end
    assert "stopped" in end.errors[0]


def test_a_stopped_evaluation_goes_on_with_other_ranks(warm: Warm, questions: Case, tmp_path: Path) -> None:
    expected = outcome(warm, questions, tmp_path / "alone", 1)
    place = tmp_path / "stopped"
    place.mkdir()
    launched = launch(warm, questions(place), 2)
    wait_for(place / "out.jsonl", '"row"', launched)
    launched.signal(1, signal.SIGTERM)
    end = launched.ended()
    assert (end.codes, end.printed, len(end.errors)) == ([75, 75], [], 1), end
    assert "of 17 questions" in end.errors[0]
    assert "run the same command again" in end.errors[0]
    kept = (place / "out.jsonl").read_bytes()
    assert expected[1].startswith(kept)
    assert outcome(warm, questions, place, 3) == expected


def test_a_stop_of_one_rank_ends_an_evaluation(warm: Warm, evaluation: Case, tmp_path: Path) -> None:
    scoring = tmp_path / "scoring"
    launched = launch(
        warm, evaluation(tmp_path), 3, broken="broken_ranks.slow_scores", environment={"SCORING": str(scoring)}
    )
    for rank in range(3):
        wait_for(scoring.with_suffix(f".{rank}"), "", launched)
    launched.signal(2, signal.SIGTERM)
    end = launched.ended()
    assert (end.codes, end.printed, len(end.errors)) == ([130] * 3, [], 1), end
    assert end.errors[0].startswith("error: stopped during evaluation: after ")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_killed_rank_ends_an_evaluation(warm: Warm, evaluation: Case, tmp_path: Path, rank: int) -> None:
    scoring = tmp_path / "scoring"
    launched = launch(
        warm, evaluation(tmp_path), 2, broken="broken_ranks.slow_scores", environment={"SCORING": str(scoring)}
    )
    for number in range(2):
        wait_for(scoring.with_suffix(f".{number}"), "", launched)
    launched.signal(rank, signal.SIGKILL)
    end = launched.ended()
    assert (end.codes[rank], end.codes[1 - rank], len(end.errors)) == (-9, 5, 1), end


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--batch-size", "3"], 5, "error: rank 1 has another batch_size than rank 0"),
        (["--limit", "0"], 2, "--limit"),
        (["--data", "absent"], 5, "error: rank 1 has another data than rank 0"),
    ],
)
def test_a_rank_with_another_request(
    warm: Warm, evaluation: Case, tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    given = evaluation(tmp_path)
    if words[0] in given:
        place = given.index(words[0])
        other = [*given[:place], *words, *given[place + 2 :]]
    else:
        other = [*given, *words]
    end = launch(warm, given, 2, {1: {"arguments": other}}).ended()
    assert (end.codes, end.printed, len(end.errors)) == ([code, code], [], 1), end
    assert text in end.errors[0]


def test_nothing_to_complete_is_one_line(warm: Warm, model: list[str]) -> None:
    end = launch(warm, ["generate", *model], 2).ended()
    assert (end.codes, end.printed, len(end.errors)) == ([2, 2], [], 1), end
    assert end.errors[0].startswith("error: no prompt: standard input")


def test_an_output_that_stands_there_is_one_line(
    warm: Warm, generation: Case, evaluation: Case, tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    for case in (generation, evaluation):
        end = launch(warm, case(tmp_path), 2).ended()
        assert (end.codes, end.printed, len(end.errors)) == ([5, 5], [], 1), end
        assert "--overwrite" in end.errors[0]
    assert (tmp_path / "out.jsonl").read_text() == "mine"

"""``llamatune judge`` on real runs: each part against another verb or another road to the same number."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import make_spec

from llamatune.checkpoints.adapter import load_adapter
from llamatune.command_options.judge import METRICS, OF_CHOICES, OF_TEXTS, JudgeOptions, parse_requirements
from llamatune.errors import SpecError, Stopped
from llamatune.events import Progress
from llamatune.inference.significance import exact_mcnemar, paired_difference_interval
from llamatune.judging.general_texts import PACKAGED
from llamatune.judging.judge_run import judge_run
from llamatune.judging.rank_used import rank_use
from llamatune.training.train import train

Command = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
ARC = [
    {"question": f"what walks {n}?", "choices": {"text": ["a red llama", f"nine {n}", "rain"], "label": list("ABC")},
     "answerKey": "ABC"[n % 3]}
    for n in range(5)
]  # fmt: skip
GSM8K = [{"question": f"nine {word}", "answer": f"red\n#### {n}"} for n, word in enumerate(("hills", "apples"))]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(prepared: Callable[..., Path]) -> Path:
    return prepared(validation_fraction=0.25, seed=3)


@pytest.fixture(scope="module")
def tuned(tiny_base: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tuned"
    train(make_spec(tiny_base(), data, run, training__num_epochs=2))
    return run


@pytest.fixture(scope="module")
def whole(tiny_base: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(make_spec(tiny_base(), data, run, lora=None, training__learning_rate=1e-3))
    return run


def judged(command: Command, run: Path, *words: object) -> dict[str, Any]:
    done = command("judge", run, "--device", "cpu", "--json", *words)
    assert done.code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def by_transformers(model: Path, adapter: Path | None = None) -> float:
    """Loss of a token of the packaged text, each passage alone behind BOS, encoded by SentencePiece itself."""
    import sentencepiece
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = network if adapter is None else PeftModel.from_pretrained(network, adapter)
    total, count = 0.0, 0
    for line in PACKAGED.read_text(encoding="utf-8").splitlines():
        ids = pieces.encode(json.loads(line)["text"])
        for start in range(0, len(ids), 255):  # windows of the context, 256, each behind BOS
            window = torch.tensor([[1, *ids[start : start + 255]]])
            with torch.no_grad():
                logs = network(window).logits[0, :-1].log_softmax(-1)
            total -= float(logs.gather(1, window[0, 1:, None]).sum())
            count += window.shape[1] - 1
    return total / count


def test_the_packaged_text_is_whole_and_says_where_it_is_from() -> None:
    rows = [json.loads(line) for line in PACKAGED.read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"source", "text"} and row["source"] for row in rows)
    size = sum(len(row["text"]) for row in rows)
    assert f"{len(rows)} passages, {size / 1000:.1f} KB" in PAGE


def test_an_adapter_is_judged_as_the_other_verbs_measure_it(
    command: Command, tuned: Path, data: Path, tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    asked, questions = lines(tmp_path / "arc.jsonl", ARC), lines(tmp_path / "gsm8k.jsonl", GSM8K)
    told = judged(
        command, tuned, "--choices", asked, "--gsm8k", questions, "--max-new-tokens", 6,
        "--per-question", tmp_path / "each.jsonl", "--plot", tmp_path / "rank.png",
    )  # fmt: skip
    base, adapter = tiny_base(), tuned / "adapter"
    model = ("--model", base, "--adapter", adapter, "--compare", "--device", "cpu", "--json")
    task = json.loads(command("evaluate", *model, "--data", data).stdout)
    assert told["task"] == task
    assert (task["split"], told["metrics"]["task_loss_change"]) == ("validation", task["loss_difference"])
    (general,) = told["texts"]
    assert general["base_loss"] == pytest.approx(by_transformers(base), abs=1e-5)
    assert general["loss"] == pytest.approx(by_transformers(base, adapter), abs=1e-5)
    assert told["metrics"]["forgetting"] == pytest.approx(general["loss"] - general["base_loss"])
    low, high = general["forgetting_interval"]
    assert low < general["forgetting"] < high
    words = ("--task", "gsm8k", "--data", questions, "--max-new-tokens", 6)
    exact = json.loads(command("evaluate", *model, *words).stdout)
    assert {key: told["gsm8k"][key] for key in exact} == exact
    use = rank_use(load_adapter(adapter))
    assert use is not None
    assert told["rank"]["mean_effective_rank"] == use.mean_effective_rank
    assert len(told["rank"]["layers"]) == 6
    assert (tmp_path / "rank.png").read_bytes().startswith(b"\x89PNG")
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    (choices,) = told["choices"]
    for prefix in ("", "base_"):
        for rule in ("acc", "acc_norm"):
            assert choices[f"{prefix}{rule}"] == sum(line[f"{prefix}{rule}"] for line in each) / len(ARC)
    gained = sum(line["acc"] and not line["base_acc"] for line in each)
    lost = sum(line["base_acc"] and not line["acc"] for line in each)
    assert (choices["acc_gained"], choices["acc_lost"]) == (gained, lost)
    assert choices["acc_p_value"] == exact_mcnemar(gained, lost)
    names = [(overlap["name"], overlap["rows"]) for overlap in told["overlap"]]
    assert names == [("task", 6), ("packaged", 13), ("arc", 5), ("gsm8k", 2)]
    summary = json.loads((tuned / "summary.json").read_text())
    assert told["cost"] == {key: summary.get(key) for key in told["cost"]}
    for figure in told["table"]:
        assert told["metrics"][figure["metric"]] == figure["tuned"]
        assert figure["change"] == pytest.approx(figure["tuned"] - figure["base"], abs=1e-9)
    for key in [*told, *told["cost"], *told["rank"], *told["overlap"][0], *general, *told["table"][0]]:
        assert f"`{key}`" in PAGE, key


def test_a_model_that_was_trained_whole_is_judged_too(
    command: Command, whole: Path, data: Path, tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    questions = lines(tmp_path / "gsm8k.jsonl", GSM8K)
    told = judged(command, whole, "--gsm8k", questions, "--max-new-tokens", 4)
    for prefix, model in (("base_", tiny_base()), ("", whole / "model")):
        alone = json.loads(command("evaluate", "--model", model, "--data", data, "--device", "cpu", "--json").stdout)
        assert told["task"][f"{prefix}loss"] == alone["loss"]
        assert told["texts"][0][f"{prefix}loss"] == pytest.approx(by_transformers(model), abs=1e-5)
    assert told["task"]["loss"] != told["task"]["base_loss"]
    assert told["rank"] is None
    assert told["weights"] == str(whole / "model")
    assert told["gsm8k"]["questions"] == 2


def test_a_plot_of_weights_without_a_rank_is_refused_before_anything_is_computed(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    done = command("judge", whole, "--device", "cpu", "--plot", tmp_path / "rank.png")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: the run trained no low-rank update, so there is no rank to")
    events: list[object] = []
    with pytest.raises(SpecError, match="no rank to draw: --plot: leave it out"):
        judge_run(JudgeOptions(run=whole, device="cpu", plot=tmp_path / "rank.png"), events.append)
    assert not any(isinstance(event, Progress) for event in events)
    assert not list(tmp_path.iterdir())


def test_requirements_decide_the_exit_code_and_the_result_is_printed(command: Command, tuned: Path) -> None:
    loss = judged(command, tuned)["metrics"]["task_loss"]
    wanted = f"task_loss<{loss + 0.01}, forgetting >= -9,overlap<=1"
    told = judged(command, tuned, "--require", wanted)
    assert [each["holds"] for each in told["requirements"]] == [True] * 3
    for mode in ([], ["--json"]):
        done = command("judge", tuned, "--device", "cpu", "--require", f"task_loss<{loss:.4f},forgetting>9", *mode)
        assert done.code == 6
        assert done.stderr.count("error: ") == 1
        assert "error: --require does not hold: forgetting is " in done.stderr
        assert "not > 9" in done.stderr
        assert "task_loss" in done.stdout
        if mode:
            assert not json.loads(done.stdout)["requirements"][1]["holds"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--require", "loss<1"], "no metric is called 'loss': --require: there are task_loss, task_perplexity"),
        (["--require", "gsm8k_accuracy>0.1"], "gsm8k_accuracy needs --gsm8k"),
        (["--require", "task_loss=1"], "'task_loss=1' is no requirement"),
        (["--require", "task_loss<nan"], "'nan' is no number"),
        (["--require", "arc.acc>0.1,"], "'' is no requirement"),
        (["--choices", "a/x.jsonl", "--general", "b/x.txt"], "two parts of the result would be called 'x'"),
        (["--choices", "task.jsonl"], "two parts of the result would be called 'task'"),
        (["--plot", "x.svg"], "a plot is a .png file"),
        (["--per-question", "x.jsonl"], "it needs --choices"),
        (["--overwrite"], "it needs --plot or --per-question"),
        (["--placement", "shard"], "judge computes in one process"),
    ],
)
def test_usage_is_refused_before_anything_is_read(command: Command, words: list[str], part: str) -> None:
    done = command("judge", "absent", *words)
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert part in done.stderr


def test_every_metric_is_told_of_and_can_be_required(command: Command, tuned: Path, tmp_path: Path) -> None:
    for name in (*METRICS, *(f"NAME.{name}" for name in (*OF_TEXTS, *OF_CHOICES))):
        assert f"`{name}`" in PAGE, name
    text = tmp_path / "own.txt"
    text.write_text("a red llama walks over green hills\n" * 30)
    asked, questions = lines(tmp_path / "arc.jsonl.gz.jsonl", ARC), lines(tmp_path / "g.jsonl", GSM8K)
    words = ("--general", text, "--choices", asked, "--gsm8k", questions, "--max-new-tokens", 2, "--limit", 2)
    options = JudgeOptions(run=tuned, general=[text], choices=[asked], gsm8k=questions)
    told = judged(command, tuned, *words)
    assert told["metrics"].keys() == options.metrics().keys()
    assert [each["name"] for each in told["texts"]] == ["packaged", "own"]
    assert told["texts"][1]["rows"] == 2


def test_what_is_missing_is_told_on_one_line(
    command: Command, tuned: Path, data: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    spec = copy / "spec.yaml"
    text = spec.read_text()
    cases: list[tuple[str, str, list[object], int, str]] = [
        (str(data), "gone", [], 3, "no such directory: gone: run judge where the run was started"),
        (str(data), str(prepared()), [], 3, "other rows than the run's are there now"),
        ("init: pretrained", "init: random", [], 2, "its base is not the model on the disk"),
        ("model:\n  path: ", "model:\n  path: gone", [], 4, "run judge where the run was started"),
    ]
    for old, new, words, code, part in cases:
        assert old in text
        spec.write_text(text.replace(old, new))
        done = command("judge", copy, "--device", "cpu", *words)
        assert (done.code, done.stdout) == (code, ""), done.stderr
        assert part in done.stderr.splitlines()[-1]
    spec.write_text(text)
    shutil.rmtree(copy / "best")
    done = command("judge", copy, "--best", "--device", "cpu")
    assert (done.code, "leave --best out" in done.stderr) == (4, True)
    assert command("judge", tmp_path, "--device", "cpu").code == 4


def test_other_rows_can_be_given_and_the_run_may_lack_its_own(
    command: Command, tuned: Path, data: Path, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    spec = copy / "spec.yaml"
    spec.write_text(spec.read_text().replace(str(data), "gone"))
    done = command("judge", copy, "--device", "cpu", "--data", prepared(), "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["overlap"], "overlap" in told["metrics"]) == (None, False)
    assert (told["task"]["split"], told["task"]["data"]) == ("train", str(prepared()))
    assert "warning: gone: no such directory, so overlap with them is not computed" in done.stderr
    done = command("judge", copy, "--device", "cpu", "--data", prepared(), "--require", "overlap<1")
    assert (done.code, "overlap needs the run's training rows" in done.stderr) == (3, True)


def test_without_validation_rows_the_training_rows_are_judged_with_a_warning(
    command: Command, tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    train(make_spec(tiny_base(), prepared(), tmp_path / "run", training__max_steps=1))
    done = command("judge", tmp_path / "run", "--device", "cpu", "--json")
    told = json.loads(done.stdout)
    assert (told["task"]["split"], told["metrics"]["overlap"]) == ("train", 1.0)
    assert "warning: " in done.stderr
    assert "it tells how well they are remembered" in done.stderr


def test_paired_intervals_hold_what_they_promise() -> None:
    """Against an exact enumeration: of 30 questions, each gained with 0.1 and lost with 0.05, 95 % cover 0.05."""
    covered = 0.0
    for gained in range(31):
        for lost in range(31 - gained):
            rest = 30 - gained - lost
            ways = math.factorial(30) // (math.factorial(gained) * math.factorial(lost) * math.factorial(rest))
            low, high = paired_difference_interval(gained, lost, 30)
            if low <= 0.05 <= high:
                covered += ways * 0.1**gained * 0.05**lost * 0.85**rest
    assert 0.93 < covered < 0.99
    low, high = paired_difference_interval(0, 0, 4)
    assert -0.7 < low < -0.2
    assert low == -high


def test_requirements_are_read_with_spaces_and_refuse_what_is_none() -> None:
    found = parse_requirements(" task_loss <= 1e0 , x.acc>0.5", "--require")
    assert [str(each) for each in found] == ["task_loss<=1", "x.acc>0.5"]
    assert found[0].holds(1.0)
    assert not found[1].holds(0.5)
    with pytest.raises(SpecError):
        parse_requirements("a<b", "--require")


def test_a_stop_ends_it_before_the_next_batch(tuned: Path) -> None:
    asked = iter([False] * 5 + [True] * 100)
    done: list[object] = []
    with pytest.raises(Stopped):
        judge_run(JudgeOptions(run=tuned, device="cpu", batch_size=1), done.append, lambda: next(asked))
    assert not any(isinstance(event, Progress) and event.task == "comparing rows" for event in done)

"""``import llamatune``: lazy and typed; each function does what its verb does, reports events, and prints nothing."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import llamatune
from llamatune import python_keywords
from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.inference import EvaluateOptions, MergeOptions
from llamatune.command_options.preparation import PrepareOptions
from llamatune.events import CheckpointSaved, EvalDone, Event, StepDone
from llamatune.openmp_variables import SPINS

ROOT = Path(__file__).parents[2]
KEYWORDS: dict[str, tuple[type, set[str]]] = {
    "PrepareKeywords": (PrepareOptions, {"rows", "tokenizer", "output", "preview", "show_ids"}),
    "GenerateKeywords": (GenerateOptions, {"model", "prompt", "adapter"}),
    "EvaluateKeywords": (EvaluateOptions, {"model", "data", "adapter"}),
    "MergeKeywords": (MergeOptions, {"model", "adapter", "output"}),
}

NOT_FOLLOWED = ("torch.*", "llamatune.requests", "llamatune.merge_proof", "llamatune.ranks", "llamatune.memory.*",
                "llamatune.data.*", "llamatune.inference.*", "llamatune.checkpoints.*")  # fmt: skip
"""What computes: to read its types takes mypy minutes, and no signature of the API names them."""


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_the_import_alone_loads_nothing() -> None:
    ours = {name for name in loaded_after("import llamatune; dir(llamatune); llamatune.__version__") if "llama" in name}
    assert ours == {"llamatune"}
    light = loaded_after("import llamatune; llamatune.train; llamatune.SpecError; llamatune.events")
    assert not light & {"torch", "pydantic", "numpy", "yaml", "typer", "rich"}


def test_the_version_is_where_the_build_reads_it() -> None:
    """hatch reads the file, and does not run it."""
    source = (ROOT / "llamatune" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^(?:__version__|VERSION)(?:: str)? = [\'"]v?(?P<version>.+?)[\'"]$', source, re.MULTILINE)
    assert found is not None
    assert found["version"] == llamatune.__version__


def test_every_name_is_there_and_no_other() -> None:
    for name in llamatune.__all__:
        assert getattr(llamatune, name) is not None
    assert set(dir(llamatune)) == set(llamatune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = llamatune.trian  # type: ignore[attr-defined]
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in llamatune.__all__ if f"`{name}" not in page and f"llamatune.{name}" not in page] == []


def as_keyword(kind: Any) -> Any:
    """The type of an option as the Python API takes it: text, where a path is."""
    if kind is Path:
        return python_keywords.AnyPath
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Sequence and arguments == (Path,):
        return Sequence[python_keywords.AnyPath]
    if Path in arguments:
        return python_keywords.AnyPath | None
    return kind


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_are_the_options_of_the_verb(name: str) -> None:
    options, others = KEYWORDS[name]
    declared = typing.get_type_hints(options)
    fields = {field.name for field in dataclasses.fields(options)}
    assert others <= fields
    given = typing.get_type_hints(getattr(python_keywords, name))
    assert given == {name: as_keyword(declared[name]) for name in fields - others}


def test_a_users_script_is_checked_strictly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    wrong = {
        'llamatune.merge("b", "a", "m", dtype="float8")': "arg-type",
        'llamatune.prepare("rows.jsonl", tokenizer="b")': "call-arg",
        'llamatune.generate("b", "x", temprature=0)': "call-arg",
        "llamatune.trian": "attr-defined",
        'llamatune.train("run.yaml", on_event=len)': "arg-type",
    }
    script.write_text(
        "import llamatune\nfrom pathlib import Path\nfrom llamatune.events import StepDone\n\n"
        "losses: list[float] = []\n\n\n"
        "def watch(event: llamatune.Event) -> None:\n"
        "    if isinstance(event, StepDone):\n        losses.append(event.loss)\n\n\n"
        'spec: llamatune.RunSpec = llamatune.load_spec(Path("run.yaml"), ["training.seed=1"])\n'
        'llamatune.prepare(["rows.jsonl"], tokenizer="b", output="p", max_seq_length=64, on_event=watch)\n'
        "try:\n    llamatune.train(spec, on_event=watch)\n"
        "except llamatune.NumericsError as fault:\n    code: int = fault.exit_code\n"
        'answers = llamatune.generate("b", ["x"], adapter=Path("a"), temperature=0)["results"]\n'
        'llamatune.evaluate("b", "p", split="train")\n'
        'llamatune.plan_memory(spec, memory="24GiB")\n' + "".join(f"{line}\n" for line in wrong)
    )
    skipped = "".join(f"[mypy-{module}]\nfollow_imports = skip\n" for module in NOT_FOLLOWED)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "--config-file", "mypy.ini", "script.py"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    lines = script.read_text().splitlines()
    faults = re.findall(r"^.*script\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert {lines[int(number) - 1]: kind for number, kind in faults} == wrong, done.stdout + done.stderr


SPEC: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "lora": {"r": 3, "alpha": 6, "target_modules": "all-linear"},
    "training": {"max_steps": 6, "gradient_accumulation_steps": 2, "precision": "fp32", "learning_rate": 0.01,
                 "device": "cpu", "save_every_steps": 2, "lr_scheduler": "linear"},
}  # fmt: skip


@pytest.fixture
def spec(small_base: Path, prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str = "run", **training: Any) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(json.dumps(SPEC))
        values["model"]["path"], values["data"] = str(small_base), {"train": str(prepared(validation_fraction=0.2))}
        values["training"] |= {"output_dir": str(tmp_path / name), **training}
        return values

    return make


Spec = Callable[..., dict[str, Any]]


@pytest.fixture
def silent(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing may be printed."""
    yield
    assert capsys.readouterr() == ("", "")


def test_the_whole_job_from_rows_to_a_merged_model(
    small_base: Path,
    tiny_rows: Path,
    tmp_path: Path,
    spec: Spec,
    command: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    events: list[Event] = []
    data = tmp_path / "data"
    how: dict[str, Any] = {"max_seq_length": 48, "skip_bad_rows": 99, "validation_fraction": 0.2}
    report = llamatune.prepare(str(tiny_rows), tokenizer=small_base, output=data, on_event=events.append, **how)
    assert report["rows_in"] == report["kept"] + report["dropped"] + report["refused"]
    values = spec() | {"data": {"train": str(data)}}
    plan = llamatune.plan_memory(values, memory="1GiB", device="cpu")
    assert plan["fits"]
    loaded = llamatune.load_spec(values, ["training.seed=3"])
    summary = llamatune.train(loaded, on_event=events.append)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert len(steps) == summary["steps"] == 6
    assert [line["loss"] for line in _metrics(tmp_path / "run", "step")] == [step.loss for step in steps]
    assert any(isinstance(event, EvalDone) for event in events)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    adapter = tmp_path / "run" / "adapter"
    greedy: dict[str, Any] = {"template": "none", "max_new_tokens": 5, "temperature": 0}
    answers = llamatune.generate(small_base, "a red llama", adapter=adapter, compare=True, **greedy)
    measured = llamatune.evaluate(small_base, data, adapter=str(adapter), compare=True)
    merged = llamatune.merge(small_base, adapter, tmp_path / "merged", dtype="float32")
    again = llamatune.generate(tmp_path / "merged", ["a red llama"], **greedy)
    assert answers["results"][0]["completion_ids"] == again["results"][0]["completion_ids"]
    assert measured["loss"] < measured["base_loss"]
    assert merged["merged_tensors"] == 14
    assert capsys.readouterr() == ("", "")
    # As the verbs say it.
    words = ("--model", small_base, "--adapter", adapter, "--template", "none", "--max-new-tokens", 5,
             "--temperature", 0)  # fmt: skip
    done = json.loads(command("generate", *words, "--prompt", "a red llama", "--compare", "--json").stdout)
    assert done["results"] == answers["results"]
    done = json.loads(command("evaluate", *words[:4], "--data", data, "--compare", "--json").stdout)
    assert done == json.loads(json.dumps(measured))
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    done = json.loads(command("plan-memory", file, "--memory", "1GiB", "--device", "cpu", "--json").stdout)
    assert done == plan
    done = json.loads(command("train", file, "training.seed=3", "--json").stdout)
    assert done == summary


def _metrics(run: Path, kind: str) -> list[Mapping[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_a_spec_comes_from_a_file_from_values_and_with_overrides(spec: Spec, tmp_path: Path) -> None:
    values = spec()
    before = json.dumps(values)
    (tmp_path / "run.yaml").write_text(before)
    loaded = llamatune.load_spec(str(tmp_path / "run.yaml"), ["lora.r=5"])
    assert loaded == llamatune.load_spec(values, ["lora.lora_alpha=6", "lora.r=5"])
    assert json.dumps(values) == before
    with pytest.raises(llamatune.SpecError, match="unknown key"):
        llamatune.load_spec(values, ["lora.rank=5"])
    with pytest.raises(llamatune.SpecError, match="given 2 times"):
        llamatune.load_spec(values, ["lora.r=5", "lora.r=6"])
    assert llamatune.load_spec(values, "lora.r=5") == llamatune.load_spec(str(tmp_path / "run.yaml"), "lora.r=5")
    more = llamatune.plan_memory(loaded, ["lora.r=50"], device="cpu")
    assert more["predicted_memory_bytes"]["adapter"] == 10 * llamatune.plan_memory(loaded, device="cpu")[
        "predicted_memory_bytes"]["adapter"]  # fmt: skip


def test_errors_are_the_classes_of_the_verbs(small_base: Path, tmp_path: Path, spec: Spec, silent: None) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    cases: list[tuple[type[llamatune.LlamatuneError], Callable[[], object]]] = [
        (llamatune.SpecError, lambda: llamatune.generate(small_base)),
        (llamatune.SpecError, lambda: llamatune.generate(small_base, "x", temperature=-1)),
        (llamatune.SpecError, lambda: llamatune.generate(small_base, "x", compare=True)),
        (llamatune.SpecError, lambda: llamatune.plan_memory(spec(), device="tpu")),
        (llamatune.SpecError, lambda: llamatune.plan_memory(spec(), memory=0)),
        (llamatune.SpecError, lambda: llamatune.plan_memory(spec(), memory=-1)),
        (llamatune.SpecError, lambda: llamatune.prepare([], tokenizer=small_base, output=tmp_path / "p")),
        (llamatune.DataError, lambda: llamatune.prepare(tmp_path / "bad.jsonl", tokenizer=small_base,
                                                        output=tmp_path / "p")),
        (llamatune.CheckpointError, lambda: llamatune.generate(tmp_path / "absent", "x")),
        (llamatune.EnvironmentFault, lambda: llamatune.merge(small_base, small_base, tmp_path / "there")),
        (llamatune.EnvironmentFault, lambda: llamatune.generate(small_base, "x", output=tmp_path / "there" / "mine")),
        (llamatune.EnvironmentFault, lambda: llamatune.train(spec("there"))),
    ]  # fmt: skip
    for kind, call in cases:
        with pytest.raises(kind) as fault:
            call()
        assert type(fault.value) is kind
        assert fault.value.what
    with pytest.raises(TypeError):
        llamatune.generate(small_base, "x", temprature=0)  # type: ignore[call-arg]
    assert not (tmp_path / "p").exists()


def test_one_text_is_never_taken_for_its_letters(small_base: Path, spec: Spec, silent: None) -> None:
    plain = llamatune.generate(small_base, "the red", max_new_tokens=12)["results"][0]["completion"]
    assert len(plain) > 3
    assert llamatune.generate(small_base, "the red", max_new_tokens=12, stop=plain + "x")["results"] == [
        *llamatune.generate(small_base, ["the red"], max_new_tokens=12, stop=[plain + "x"])["results"]
    ]
    llamatune.train(spec(), "training.max_steps=1")
    changed = ["training.max_steps=2", "training.weight_decay=0.5"]
    with pytest.raises(llamatune.SpecError, match="weight_decay"):
        llamatune.train(spec(), changed)
    assert llamatune.train(spec(), changed, allow_spec_change="training.weight_decay")["steps"] == 2


# Stops.


def test_should_stop_saves_and_the_same_call_goes_on_with_the_same_bytes(
    spec: Spec, tmp_path: Path, silent: None
) -> None:
    done: list[Event] = []
    watch = lambda event: done.append(event) if isinstance(event, StepDone) else None  # noqa: E731
    with pytest.raises(llamatune.Stopped):
        llamatune.train(spec("stopped"), on_event=watch, should_stop=lambda: len(done) == 3)
    assert len(done) == 3
    llamatune.train(spec("stopped"), on_event=watch)
    assert len(done) == 6
    llamatune.train(spec("whole"))
    assert _adapter(tmp_path / "stopped") == _adapter(tmp_path / "whole")


def _adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_ctrl_c_saves_and_then_interrupts(spec: Spec, tmp_path: Path, silent: None) -> None:
    saved: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGINT)
        if isinstance(event, CheckpointSaved):
            saved.append(event.step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        llamatune.train(spec("stopped"), on_event=watch)
    assert signal.getsignal(signal.SIGINT) is before
    assert saved == [2, 3]
    llamatune.train(spec("stopped"))
    llamatune.train(spec("whole"))
    assert _adapter(tmp_path / "stopped") == _adapter(tmp_path / "whole")


def test_a_second_ctrl_c_interrupts_at_once_and_leaves_a_run_that_goes_on(
    spec: Spec, tmp_path: Path, silent: None
) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llamatune.train(spec("stopped"), on_event=watch)
    assert signal.getsignal(signal.SIGINT) is before
    llamatune.train(spec("stopped"))  # from the checkpoint after step 2
    llamatune.train(spec("whole"))
    assert _adapter(tmp_path / "stopped") == _adapter(tmp_path / "whole")


def test_no_handler_of_the_users_is_touched(spec: Spec) -> None:
    seen: list[object] = []
    handler = lambda number, frame: None  # noqa: E731
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.signal(number, handler) for number in signals]
    try:
        llamatune.train(spec(), on_event=lambda event: seen.extend(map(signal.getsignal, signals)))
        assert set(seen) == {handler}
        assert [signal.getsignal(number) for number in signals] == [handler] * 3
    finally:
        for number, action in zip(signals, before, strict=True):
            signal.signal(number, action)


def test_other_signals_stay_as_they_are_where_ctrl_c_is_noted(spec: Spec) -> None:
    before = {number: signal.getsignal(number) for number in signal.Signals if number != signal.SIGINT}
    seen: list[bool] = []
    llamatune.train(
        spec(), on_event=lambda event: seen.append(all(signal.getsignal(n) == held for n, held in before.items()))
    )
    assert all(seen)


def test_a_run_in_a_thread_handles_no_signal(spec: Spec, tmp_path: Path) -> None:
    results: list[Any] = []
    before, during = signal.getsignal(signal.SIGINT), list[object]()

    def work() -> None:
        results.append(llamatune.train(spec("threaded"), on_event=lambda event: during.append(
            signal.getsignal(signal.SIGINT))))  # fmt: skip

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0]["steps"] == 6
    assert set(during) == {before}
    llamatune.train(spec("whole"))
    assert _adapter(tmp_path / "threaded") == _adapter(tmp_path / "whole")


def test_an_error_of_the_callback_is_the_callers(spec: Spec, tmp_path: Path) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llamatune.train(spec("stopped"), on_event=watch)
    llamatune.train(spec("stopped"))
    llamatune.train(spec("whole"))
    assert _adapter(tmp_path / "stopped") == _adapter(tmp_path / "whole")


COMPUTING = (
    "prepare('rows', tokenizer='missing', output='out')",
    "train({'model': {'path': 'missing'}, 'lora': {}, 'data': {'train': 'no'}, 'training': {'output_dir': 'out'}})",
    "generate('missing', 'Hello')",
    "evaluate('missing', 'missing')",
    "merge('missing', 'missing', 'out')",
)


@pytest.mark.parametrize("call", COMPUTING, ids=lambda call: call.partition("(")[0])
def test_threads_wait_as_on_the_command_line(call: str, tmp_path: Path) -> None:
    """The first import of torch ends the process, and tells what OpenMP would read."""
    code = f"""
import builtins, os
kept = builtins.__import__
def watched(name, *rest, **named):
    if name.partition(".")[0] == "torch":
        print(os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT"), flush=True)
        os._exit(0)
    return kept(name, *rest, **named)
builtins.__import__ = watched
import llamatune
try:
    llamatune.{call}
except llamatune.LlamatuneError as fault:
    print(os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT"))
"""
    clean = {name: text for name, text in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in {"passive", str(SPINS)}, done.stderr


def test_a_number_of_threads_that_is_none_is_an_error_here_too(tmp_path: Path) -> None:
    code = (
        "import llamatune\ntry: llamatune.generate('m', 'x')\nexcept llamatune.EnvironmentFault as fault: print(fault)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "many"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "'many' is no number of threads" in done.stdout


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("load_spec", {"source": 5}, "source is 5, where text or a path or a dict is expected"),
    ("load_spec", {"source": "x", "overrides": [3]}, "overrides[0] is 3, where text is expected"),
    ("train", {"spec": None}, "spec is None, where a RunSpec or text or a path or a dict is expected"),
    ("train", {"spec": "x", "resume": "auto"}, "resume is 'auto', where True or False is expected"),
    ("train", {"spec": "x", "on_event": 3}, "on_event is 3, where a function is expected"),
    ("generate", {"model": "m", "prompts": 5}, "prompts is 5, where text or a list of text is expected"),
    ("generate", {"model": "m", "prompts": b"x"}, "prompts is b'x', where text or a list of text is expected"),
    ("generate", {"model": "m", "prompts": {"x": 1}}, "prompts is {'x': 1}, where text or a list of text is expected"),
    ("generate", {"model": "m", "max_new_tokens": "64"}, "max_new_tokens is '64', where a whole number is expected"),
    ("generate", {"model": "m", "temperature": None}, "temperature is None, where a number is expected"),
    ("generate", {"model": "m", "weights": [1, "x"]}, "weights[1] is 'x', where a number is expected"),
    ("generate", {"model": "m", "lookup": 1}, "lookup is 1, where 'auto' or 'on' or 'off' is expected"),
    ("generate", {"model": "m", "rows": 3}, "rows is 3, where a dict or None is expected"),
    ("evaluate", {"model": "m", "data": 3}, "data is 3, where text or a path is expected"),
    ("evaluate", {"model": "m", "data": "d", "batch_size": True}, "batch_size is True, where a whole number"),
    ("merge", {"model": "m", "adapter": [3], "output": "o"}, "adapter[0] is 3, where text or a path is expected"),
    ("prepare", {"rows": "r", "tokenizer": None, "output": "o"}, "tokenizer is None, where text or a path is expected"),
    ("plan_memory", {"spec": "x", "memory": 1.5}, "memory is 1.5, where text or a whole number or None is expected"),
    ("plan_memory", {"spec": "x", "ranks": "2"}, "ranks is '2', where a whole number is expected"),
]


@pytest.mark.parametrize(("name", "arguments", "told"), WRONG_TYPES, ids=[told[:30] for *_, told in WRONG_TYPES])
def test_an_argument_of_another_type_is_named_at_the_door(name: str, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError) as caught:
        getattr(llamatune, name)(**arguments)
    assert str(caught.value).startswith(f"{name}(): {told}")


@pytest.mark.parametrize("name", ["load_spec", "prepare", "train", "generate", "evaluate", "merge", "plan_memory"])
def test_every_argument_of_every_function_is_checked(name: str) -> None:
    """An object of no known type fits none of them."""
    function = getattr(llamatune, name)
    required = {"source": {}, "spec": {}} | dict.fromkeys(
        ("rows", "tokenizer", "output", "model", "data", "adapter"), "x"
    )
    keywords = getattr(python_keywords, f"{name.capitalize()}Keywords", None)
    parameters = {key for key in inspect.signature(function).parameters if key != "options"}
    given = {key: value for key, value in required.items() if key in parameters}
    for argument in parameters | set(typing.get_type_hints(keywords) if keywords else ()):
        with pytest.raises(TypeError, match=re.escape(f"{name}(): {argument} is <object")):
            function(**given | {argument: object()})


@pytest.mark.parametrize("arguments", [{}, {"model": "m", "prompt": "x"}, {"model": "m", "modle": "x"}])
def test_an_argument_that_is_missing_or_unknown_is_pythons_own_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        TypeError, match=r"generate\(\) (missing 1 required|got an unexpected).* '(model|prompt|modle)'"
    ):
        llamatune.generate(**arguments)


def test_a_spec_of_paths_and_numpys_numbers_is_a_spec_of_text_and_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    values = {
        "model": {"path": tmp_path},
        "lora": {"r": numpy.int64(3), "target_modules": ("q_proj",)},
        "data": {"train": [tmp_path / "a", "b"]},
        "training": {"output_dir": tmp_path / "run", "learning_rate": numpy.float32(0.5)},
    }
    spec = llamatune.load_spec(values)
    assert (spec.model.path, spec.lora and spec.lora.r, spec.training.learning_rate) == (str(tmp_path), 3, 0.5)
    assert values["lora"]["target_modules"] == ("q_proj",)  # what was given is not changed
    for wrong in (
        {1: 2},
        {"model": {1: 2}},
        {"model": 5},
        {"training": {"seed": iter(())}},
        {"lora": {"ranks": {3: 4}}},
    ):
        with pytest.raises(llamatune.SpecError, match="the spec"):
            llamatune.load_spec(wrong)
    with pytest.raises(llamatune.SpecError, match="--adapter is empty"):
        llamatune.merge("m", [], "o")

"""Engines whose steps are captured and read later, against ordinary ones; a recorder plays CUDA's graphs on the CPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraphs

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.errors import NumericsError, Stopped
from llamatune.events import Event, ignore_event, never_stop
from llamatune.inference import captured_steps, sampling
from llamatune.inference.captured_steps import CapturedSteps, Run, graphs_for
from llamatune.inference.completion import Completion
from llamatune.inference.engine import Engine, completions
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import open_model
from llamatune.inference.prompt_lookup import PromptLookup
from llamatune.inference.running_sequences import IsEnough, RunningSequence
from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.kv_cache import RowCache
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.transformer import Transformer
from llamatune.shapes import generation_sizes
from llamatune.shapes.generation_sizes import captured_rows

_chance = random.Random(17)
PROMPTS = [[1, *(_chance.randrange(3, 131) for _ in range(length))] for length in (3, 0, 5, 1, 2, 2, *range(1, 31, 3))]
EOS = frozenset(range(3, 15))
GREEDY, DRAWN = Sampling(26, 0), Sampling(26, 1.0, seed=5)


@pytest.fixture(autouse=True)
def drawn_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary engines draw on the device too, and the cache grows often."""
    monkeypatch.setattr(sampling, "_draws_on_the_host", lambda logits: False)
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 4)
    monkeypatch.setattr(captured_steps, "_STEPS_BEFORE", 0)


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path]) -> Transformer:
    return load_model(tiny_base()).eval()


def answers(
    model: Transformer,
    rows: int,
    how: Sequence[Sampling] = (GREEDY,),
    graphs: Any = None,
    is_enough: IsEnough | None = None,
    on_event: Callable[[Event], None] = ignore_event,
) -> list[Completion]:
    """Of all prompts, with each way of ``how`` in turn; steps are captured by ``graphs``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_steps, "graphs_for", lambda model: graphs)
        work, found = Engine(model, EOS, rows, is_enough, on_event=on_event), dict[int, Completion]()
        for prompt, sampling in zip(PROMPTS, itertools.cycle(how), strict=False):
            work.add(prompt, sampling)
        while not work.is_done:
            found.update(work.step())
    return [found[number] for number in range(len(PROMPTS))]


SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "every query its own keys": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "sliding window": {"model_type": "mistral", "sliding_window": 9},
    "biases": {"model_type": "qwen2"},
    "head norms": {"model_type": "qwen3", "head_dim": 8},
    "stretched angles": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "dynamic angles": {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_of_an_ordinary_engine(tiny_base: Callable[..., Path], shape: str) -> None:
    """More prompts than rows, which end by EOS and by length; steps of more rows than run; a cache that grows."""
    model = load_model(tiny_base(**SHAPES[shape])).eval()
    for rows, how in ((6, DRAWN), *([(16, DRAWN), (1, GREEDY)] if shape == "grouped" else [])):
        graphs, expected = RecordedGraphs(), answers(model, rows, [how])
        assert answers(model, rows, [how], graphs) == expected
        assert how == GREEDY or {one.finish_reason for one in expected} == {"eos", "length"}
        rooms, captured = graphs.log.count("cleared"), graphs.log.count("captured")
        assert rooms > 2 or rows == 16, "growth"
        assert captured > rooms or rows != 6, "several sizes"
        assert graphs.log.count("launched") >= sum(len(one.ids) - 1 for one in expected) // rows


@pytest.mark.parametrize("kind", ["joined", "lora", "dora", *QUANTIZATIONS])
def test_weights_of_every_form_are_captured(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], kind: str
) -> None:
    base = tiny_base()
    if kind in QUANTIZATIONS:
        model = load_model(base, torch.float32, writable=True).eval()
        quantize_blocks(model, QUANTIZATIONS[kind], torch.float32)
    else:
        adapter = None if kind == "joined" else peft_adapter(base, use_dora=kind == "dora")
        opened = open_model(ModelSource(base, adapter, device="cpu"))
        model = opened.load(ignore_event, never_stop, generates=kind != "dora").by_prefix[""]
    graphs = RecordedGraphs()
    assert answers(model, 5, [DRAWN], graphs) == answers(model, 5, [DRAWN])
    assert "launched" in graphs.log


def test_base_and_tuned_model_share_captured_steps(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of both, which change places; then each model alone is what it was."""
    base = tiny_base()
    models = open_model(ModelSource(base, peft_adapter(base), compare=True, device="cpu")).load(
        ignore_event, never_stop
    )

    def pairs(how: Sampling, **changes: Any) -> list[tuple[Completion, ...]]:
        return list(completions_by_model(replace(models, **changes), PROMPTS, how, EOS, 3))

    apart, together = pairs(DRAWN, switch=None), pairs(DRAWN)
    assert sum(tuned.ids != bare.ids for tuned, bare in apart) > len(apart) // 2
    graphs = RecordedGraphs()
    monkeypatch.setattr(captured_steps, "graphs_for", lambda model: graphs)
    assert pairs(DRAWN) == together == apart
    assert graphs.log.count("launched") > 50
    hold = AdapterSwitch.hold
    with monkeypatch.context() as patch:
        patch.setattr(AdapterSwitch, "hold", lambda self, acts: hold(self, acts | True))
        assert pairs(DRAWN) != apart, "which rows are adapted is read from the step's tensor"


def test_a_row_may_end_where_its_room_ends(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then steps of more rows than run go over its place, which lies beyond the room if it is not held back."""
    prompts = [[1, 40], [1, 41], [1, 42], [1, 43, 44, 45, 46]]

    def made(length: int, graphs: RecordedGraphs | None) -> list[list[int]]:
        """The longest row, which is the last, ends at so many tokens, and the others run on."""
        with monkeypatch.context() as patch:
            patch.setattr(captured_steps, "graphs_for", lambda model: graphs)
            work, found = Engine(model, (), 4, lambda prompt, ids: prompt[1] == 43 and len(ids) == length - 5), {}
            for prompt in prompts:
                work.add(prompt, Sampling(40, 0))
            while not work.is_done:
                found.update(work.step())
        return [found[number].ids for number in range(4)]

    for length in (9, 10, 11, 19, 20, 21):  # the room is of 5 tokens, and doubles
        assert made(length, RecordedGraphs()) == made(length, None)


WAYS = {
    "nucleus": [Sampling(20, 0.7, top_k=20, top_p=0.8, seed=2)],
    "least share": [Sampling(20, 1.2, min_p=0.02, seed=2)],
    "penalised": [Sampling(20, 0, repetition_penalty=1.3)],
    "each its own": [Sampling(9, 0), Sampling(24, 1.0, seed=3), Sampling(16, 0.7, top_k=5, seed=4)],
}


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_sampling(model: Transformer, monkeypatch: pytest.MonkeyPatch, way: str, before: int) -> None:
    """Penalised rows, and rows that are sampled in several ways, are computed by ordinary steps, among the others."""
    monkeypatch.setattr(captured_steps, "_STEPS_BEFORE", before)
    graphs, expected = RecordedGraphs(), answers(model, 5, WAYS[way])
    assert answers(model, 5, WAYS[way], graphs) == expected
    assert answers(model, 17, WAYS[way]) == expected, "a draw does not depend on the batch"
    assert before or ("launched" in graphs.log) == (way != "penalised")


def test_a_size_is_captured_once_it_was_wanted_for_a_while(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "_STEPS_BEFORE", 10)
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 256)
    graphs = RecordedGraphs()
    answers(model, 4, [Sampling(11, 0)] * 4, graphs)
    first = graphs.log.index("captured")
    assert graphs.log[:first] == ["cleared"]
    answers(model, 17, [Sampling(10, 0)], short := RecordedGraphs())
    assert "captured" not in short.log


def test_enough_is_asked_of_every_token_and_of_none_beyond_the_end(model: Transformer) -> None:
    def asked(graphs: Any) -> tuple[list[Completion], list[tuple[int, ...]]]:
        seen: list[tuple[int, ...]] = []

        def is_enough(prompt: Sequence[int], ids: Sequence[int]) -> bool:
            seen.append((*prompt, -1, *ids))
            return ids[-1] % 37 == 0

        return answers(model, 5, [DRAWN], graphs, is_enough), sorted(seen)

    found, expected = asked(RecordedGraphs()), asked(None)
    assert found == expected
    assert {one.finish_reason for one in found[0]} == {"eos", "stop", "length"}


def test_completions_keep_their_order_and_stop_between_two_tokens(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = replace(DRAWN, num_return_sequences=2)
    expected = list(completions(model, PROMPTS, several, EOS, 5))
    monkeypatch.setattr(captured_steps, "graphs_for", lambda model: RecordedGraphs())
    assert list(completions(model, iter(PROMPTS), several, EOS, 5)) == expected
    assert list(completions(model, PROMPTS[::-1], several, EOS, 7))[::-2] == expected[1::2]
    answers_to_stop = iter([False] * 9 + [True])
    with pytest.raises(Stopped):
        list(completions(model, PROMPTS, DRAWN, EOS, 5, lambda: next(answers_to_stop)))


def test_an_engine_goes_on_with_prompts_that_are_added_after_all_have_ended(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that was launched before the last EOS was read has no say in it."""
    monkeypatch.setattr(captured_steps, "graphs_for", lambda model: RecordedGraphs())
    work, pending = Engine(model, EOS, 1), 0
    for number, prompt in enumerate(PROMPTS):
        work.add(prompt, DRAWN)
        while not work.is_done:
            ended = work.step()
        pending += work._launched is not None
        with monkeypatch.context() as patch:
            patch.setattr(captured_steps, "graphs_for", lambda model: None)
            assert ended == [(number, next(completions(model, [prompt], DRAWN, EOS, 1)))]
    assert pending > 5


def test_drafts_for_the_last_that_runs(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched for two rows is taken before the first draft."""
    ticks, drafted = itertools.count(), 0
    asked = [([1, *[5, 30, 9, 77] * 3], Sampling(15, 0)), ([1, *[40, 7] * 4], Sampling(70, 0))]
    found = []
    for graphs in (None, RecordedGraphs()):
        lookup = PromptLookup(clock=lambda: float(next(ticks)))
        monkeypatch.setattr(captured_steps, "graphs_for", lambda model, graphs=graphs: graphs)
        work = Engine(model, (), 2, lookup=lookup)
        for prompt, how in asked:
            work.add(prompt, how)
        ended: dict[int, Completion] = {}
        while not work.is_done:
            ended.update(work.step())
        found.append(ended)
        drafted += len(lookup._drafted)
    assert found[0] == found[1]
    assert drafted
    assert graphs is not None
    assert "launched" in graphs.log


def test_a_step_is_launched_before_the_last_one_is_read(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first and the last; 12 tokens are one of the prompt's pass and 11 of steps."""
    monkeypatch.setattr(generation_sizes, "FIRST_ROOM_TOKENS", 256)
    graphs, fetched = RecordedGraphs(), captured_steps.fetched

    def noted(x: torch.Tensor) -> Callable[[], list[int]]:
        numbers = fetched(x)
        return lambda: graphs.log.append("read") or numbers()  # type: ignore[func-returns-value]

    monkeypatch.setattr(captured_steps, "fetched", noted)
    monkeypatch.setattr(captured_steps, "graphs_for", lambda model: graphs)
    work = Engine(model, (), 3)
    for prompt in PROMPTS[:3]:
        work.add(prompt, Sampling(12, 0))
    while not work.is_done:
        work.step()
    steps = ["launched", *["launched", "read"] * 10, "read"]
    assert graphs.log == ["cleared", "captured", *steps]


def test_what_follows_logits_without_a_token_is_an_error_and_no_wrong_address(tiny_base: Callable[..., Path]) -> None:
    """The weights break between two steps: the step that is launched meanwhile has no token to go on with."""
    broken = load_model(tiny_base(), writable=True).eval()

    def breaks(prompt: Sequence[int], ids: Sequence[int]) -> bool:
        if len(ids) == 6:
            with torch.no_grad():
                broken.model.norm.weight.fill_(torch.nan)
        return False

    for how in (GREEDY, DRAWN):
        broken.model.norm.weight.data.fill_(1)
        with pytest.raises(NumericsError, match="NaN or infinity"):
            answers(broken, 5, [how], RecordedGraphs(), breaks)


class OutOfMemory(RecordedGraphs):
    """Has memory for so many captures."""

    def __init__(self, captures: int) -> None:
        super().__init__()
        self._left = captures

    def capture(self, step: Run) -> Run:
        step()
        if not self._left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nMore lines")
        self._left -= 1
        return super().capture(step)


@pytest.mark.parametrize("captures", [0, 1, 4])
def test_where_a_capture_fails_it_goes_on_without_and_says_so_once(model: Transformer, captures: int) -> None:
    told: list[Event] = []
    graphs = OutOfMemory(captures)
    assert answers(model, 6, [DRAWN], graphs, on_event=told.append) == answers(model, 6, [DRAWN])
    (notice,) = told
    assert notice.kind == "warning"
    assert "cannot be captured as a CUDA graph (CUDA out of memory. Tried to allocate 2 MiB.): tokens" in notice.message
    assert graphs.log.count("captured") == captures
    assert ("launched" in graphs.log) == (captures > 0)


def test_steps_are_captured_on_a_gpu_alone_of_one_model_whose_weights_lie_there(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed blocks are brought by the host; autocast is told of in ``Engine``."""
    assert graphs_for(model) is None
    streamed: Any = SimpleNamespace(device=torch.device("cuda"), is_streamed=True)
    assert graphs_for(streamed) is None
    monkeypatch.setattr(captured_steps, "graphs_for", lambda model: RecordedGraphs())
    assert Engine(model, (), 2)._captured is not None
    assert Engine(model, (), 2, trains=True)._captured is None


def test_a_few_sizes_serve_all_numbers_of_rows() -> None:
    assert [captured_rows(running, 64) for running in (1, 2, 3, 4, 5, 8, 9, 16)] == [1, 2, 4, 4, 8, 8, 16, 16]
    for rows in range(1, 100):
        sizes = [captured_rows(running, rows) for running in range(1, rows + 1)]
        assert sizes == sorted(sizes)
        assert all(running <= size < 2 * running for running, size in enumerate(sizes, 1) if size > 1)
        assert max(sizes) == rows
        assert len(set(sizes)) <= 5 + rows // 16


# Faults, planted to show that the comparison finds them.

_sound: list[list[Completion]] = []
"""Answers without a fault."""


def _forgets_the_tokens(patch: pytest.MonkeyPatch) -> None:
    begin = CapturedSteps.begin

    def run(self: CapturedSteps, running: Sequence[RunningSequence]) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(captured_steps, "sent", lambda x, device: x * torch.tensor([[0], [1], [1]]))
            return begin(self, running)

    patch.setattr(CapturedSteps, "begin", run)


def _forgets_the_places(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(captured_steps, "sent", lambda x, device: x * torch.tensor([[1], [0], [1]]))


def _keeps_graphs_after_growth(patch: pytest.MonkeyPatch) -> None:
    begin = CapturedSteps.begin

    def run(self: CapturedSteps, running: Sequence[RunningSequence]) -> Any:
        self._room = self._cache.room
        return begin(self, running)

    patch.setattr(CapturedSteps, "begin", run)


def _leaves_rows_where_they_were(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CapturedSteps, "move", lambda self, origin: None)


def _takes_tokens_behind_the_end(patch: pytest.MonkeyPatch) -> None:
    take = Engine._take

    def run(self: Engine, tokens: Sequence[int], sequences: Sequence[RunningSequence]) -> Any:
        for sequence in sequences:
            sequence.reason = ""
        return take(self, tokens, sequences)

    patch.setattr(Engine, "_take", run)


def _reads_what_the_next_step_wrote(patch: pytest.MonkeyPatch) -> None:
    held: list[torch.Tensor] = []

    def fetched(x: torch.Tensor) -> Callable[[], list[int]]:
        held[:] = [x]
        return lambda: held[0].tolist()

    patch.setattr(captured_steps, "fetched", fetched)


def _sees_stale_keys(patch: pytest.MonkeyPatch) -> None:
    mask = RowCache._mask
    patch.setattr(RowCache, "_mask", lambda self, places, keys: mask(self, places + 2, keys))


def _draws_for_the_row_before(patch: pytest.MonkeyPatch) -> None:
    chosen = captured_steps.chosen_tokens
    patch.setattr(captured_steps, "chosen_tokens", lambda logits, how, all: chosen(logits, how, all[-1:] + all[:-1]))


@pytest.mark.parametrize(
    "fault",
    [
        _forgets_the_tokens,
        _forgets_the_places,
        _keeps_graphs_after_growth,
        _leaves_rows_where_they_were,
        _takes_tokens_behind_the_end,
        _reads_what_the_next_step_wrote,
        _sees_stale_keys,
        _draws_for_the_row_before,
    ],
)
def test_a_planted_fault_is_found(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """With rows that are given to others, and with a row for each prompt."""
    if not _sound:
        _sound.extend(answers(model, rows, [DRAWN]) for rows in (6, 16))
        assert [answers(model, rows, [DRAWN], RecordedGraphs()) for rows in (6, 16)] == _sound
    fault(monkeypatch)
    try:
        found: object = [answers(model, rows, [DRAWN], RecordedGraphs()) for rows in (6, 16)]
    except (AssertionError, IndexError, ValueError, KeyError, RuntimeError) as raised:
        found = raised
    assert found != _sound

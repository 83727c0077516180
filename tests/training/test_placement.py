"""``model.placement``: blocks that lie in host memory or in slices give the bytes of blocks on the device."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import step_meter
import torch
from run_tools import StopAfter, assert_same_outcome, make_spec, metrics, run_and_record
from step_meter import StepMeter
from step_tools import step_bytes
from thread_ranks import in_threads
from torch import Tensor

from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.command_options.inference import Sampling
from llamatune.data.batches import Batch
from llamatune.errors import SpecError, Stopped
from llamatune.events import Notice, ignore_event, never_stop
from llamatune.inference.engine import complete
from llamatune.memory.plan import choose_placement
from llamatune.memory.sizes import Rows
from llamatune.model import compiled_functions, streamed_blocks
from llamatune.model.block_stores import HostBlocks, ShardedBlocks
from llamatune.model.loss import IGNORED
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.streamed_blocks import BlockLayout, StreamedBlocks
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec, build_spec
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.train import train
from llamatune.training.training_step import make_update

CONFIG = LlamaConfig(48, 100, 5, 6, 2, 131)
DTYPES = [
    *(("float32", "fp32"), ("bfloat16", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")),
    *(("float32", "bf16"), ("float8", "bf16")),
]
LEVELS = [
    *((mode, True) for mode in ("none", "feed_forward", "projections", "block", "every_2", "attention", "sublayer")),
    *((mode, False) for mode in ("none", "block", "sublayer", "every_2", "attention", "feed_forward")),
]


def cases(kinds: Sequence[Any]) -> list[Any]:
    """Every kind with every level and dtype; one dtype and kind of each level is tried always."""
    always = [(kinds[i % len(kinds)], *level, DTYPES[i % len(DTYPES)]) for i, level in enumerate(LEVELS)]
    every = [(kind, *level, dtype) for kind in kinds for level in LEVELS for dtype in DTYPES]
    return [case if case in always else pytest.param(*case, marks=pytest.mark.slow) for case in every]


Found = tuple[list[tuple[float, float]], list[Tensor]]


def spec_of(placement: str, dtype: tuple[str, str] = DTYPES[0], dropout: float = 0.0, **training: Any) -> RunSpec:
    values = {
        "model": {"path": "none", "init": "random", "dtype": dtype[0], "placement": placement},
        "lora": {
            "r": 4,
            "dropout": dropout,
            "target_modules": training.pop("targets", "all-linear"),
            **training.pop("lora", {}),
        },
        "data": {"train": "none"},
        "training": {"output_dir": "none", "precision": dtype[1], "device": "cpu", "learning_rate": 0.02, **training},
    }
    return build_spec(values, "test")


def samples(*lengths: int) -> Batch:
    """One row of samples, the second half of each a target."""
    ids = torch.randint(3, 131, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    known = torch.cat([torch.arange(length) < length // 2 for length in lengths])[None]
    targets = sum(length - length // 2 for length in lengths)
    return Batch(ids, ids.masked_fill(known, IGNORED), lengths, tuple(range(len(lengths))), targets)


# Five passes, then two: with four ranks the busiest has two passes, and in the second window two ranks are idle.
WINDOWS = [[samples(11, 5), samples(7), samples(20, 3), samples(9), samples(4, 4, 4)], [samples(13), samples(6, 2)]]


def learner_of(spec: RunSpec, config: LlamaConfig = CONFIG, ranks: Ranks = ALONE) -> Learner:
    inputs = step_meter._inputs_without_data(spec, config)
    return build_learner(spec, inputs, ignore_event, never_stop, ranks=ranks)


def trained(spec: RunSpec, config: LlamaConfig = CONFIG, ranks: Ranks = ALONE) -> Found:
    """Loss and gradient norm of each update, and the adapter after them."""
    learner, figures = learner_of(spec, config, ranks), []
    for number in range(4):
        update = make_update(learner, WINDOWS[number % 2], spec.training, number, 0.02, ranks=ranks)
        figures.append((update.loss, update.grad_norm))
    return figures, [parameter.detach() for parameter in learner.parameters.values()]


def same(found: Found, expected: Found) -> bool:
    return found[0] == expected[0] and all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize(("placement", "mode", "fused", "dtype"), cases(["host", "shard"]))
def test_one_process_has_the_bytes_of_blocks_on_the_device(
    placement: str, mode: str, fused: bool, dtype: tuple[str, str]
) -> None:
    how = {"dropout": 0.1, "activation_checkpointing": mode, "fused": fused}
    expected = trained(spec_of("device", dtype, **how))
    assert same(trained(spec_of(placement, dtype, **how)), expected)
    assert expected[0][-1] != expected[0][1], "nothing was learned"


@pytest.mark.parametrize(("size", "mode", "fused", "dtype"), cases([4, 2]))
def test_slices_on_several_ranks_have_the_bytes_of_one_process(
    size: int, mode: str, fused: bool, dtype: tuple[str, str]
) -> None:
    how = {"activation_checkpointing": mode, "fused": fused}
    expected = trained(spec_of("device", dtype, **how))
    for found in in_threads(size, lambda ranks: trained(spec_of("shard", dtype, **how), ranks=ranks)):
        assert same(found, expected)


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [({"kind": "dora"}, ("nf4", "bf16")), ({"init": "pissa"}, ("float32", "fp32")),
     ({"init": "olora", "lr_ratio": 4.0}, ("float8", "bf16"))],
    ids=str,
)  # fmt: skip
def test_kinds_that_begin_with_the_weights_of_the_base(lora: dict[str, Any], dtype: tuple[str, str]) -> None:
    expected = trained(spec_of("device", dtype, lora=lora))
    assert same(trained(spec_of("host", dtype, lora=lora)), expected)
    for found in in_threads(2, lambda ranks: trained(spec_of("shard", dtype, lora=lora), ranks=ranks)):
        assert same(found, expected)


def test_a_start_that_reads_the_base_tells_how_far_it_is_and_can_be_stopped() -> None:
    spec, seen = spec_of("device", lora={"init": "pissa"}), list[Any]()
    inputs = step_meter._inputs_without_data(spec, CONFIG)
    with pytest.raises(Stopped, match="the adapter was begun"):
        build_learner(spec, inputs, seen.append, lambda: len(seen) == 3)
    assert [(event.task, event.done, event.total) for event in seen] == [
        ("beginning the adapter", layer, 5) for layer in (1, 2, 3)
    ]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_layers(layers: int) -> None:
    config = CONFIG.with_layers(layers)
    expected = trained(spec_of("device"), config)
    assert same(trained(spec_of("host"), config), expected)
    for found in in_threads(3, lambda ranks: trained(spec_of("shard"), config, ranks)):
        assert same(found, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_without_the_fetch_before_the_backward_pass_the_gradient_is_wrong(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """The control: the first loss is right, so a comparison of losses alone would need a second step."""
    spec, expected = spec_of("shard", fused=fused), trained(spec_of("device", fused=fused))
    hooks = streamed_blocks._hooks

    def forward_alone(blocks: StreamedBlocks, index: int) -> Any:
        return hooks(blocks, index)[0], lambda *_: None

    monkeypatch.setattr(streamed_blocks, "_hooks", forward_alone)
    found = trained(spec)
    assert found[0][0][0] == expected[0][0][0]
    assert found[0][0][1] != pytest.approx(expected[0][0][1], rel=1e-2)
    assert found[0][1][0] != expected[0][1][0]


def test_a_plain_block_needs_writes_that_autograd_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a fetch into the rooms themselves raises the version of every weight that autograd keeps."""
    make = StreamedBlocks.__init__

    def counted(self: StreamedBlocks, *given: Any) -> None:
        make(self, *given)
        self._writable = self._rooms

    monkeypatch.setattr(StreamedBlocks, "__init__", counted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(spec_of("host", fused=False))


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_an_idle_rank_fetches_what_a_pass_does(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Also what is fetched ahead: the sequence of collectives must be the same on every rank."""
    fetched: list[int] = []
    fetch = HostBlocks.fetch

    def noted(self: HostBlocks, layer: int, room: Tensor) -> Any:
        fetched.append(layer)
        return fetch(self, layer, room)

    monkeypatch.setattr(HostBlocks, "fetch", noted)
    working, idle = (learner_of(spec_of("host"), CONFIG.with_layers(layers)) for _ in range(2))
    assert working.streamed is not None
    assert idle.streamed is not None
    by_pass, by_idling = [], []
    for windows in range(3):
        fetched.clear()
        make_update(working, [WINDOWS[0][0]], spec_of("host").training, windows, 0.02)
        with torch.no_grad():
            working.model(WINDOWS[0][0].input_ids, lengths=WINDOWS[0][0].lengths)
        by_pass.append(fetched[:])
        fetched.clear()
        idle.streamed.idle(backward=True)
        idle.streamed.idle(backward=False)
        by_idling.append(fetched[:])
    assert by_pass == by_idling
    fetched.clear()
    for windows in range(2):
        make_update(working, [WINDOWS[0][0]], spec_of("host").training, windows, 0.02)
        if not windows:
            fetched.clear()
    assert len(fetched) == 2 * max(0, layers - 2), "the two blocks at each turn are there already"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [("bfloat16", "bf16"), ("nf4", "bf16"), ("float8", "bf16")])
def test_compiled_functions(monkeypatch: pytest.MonkeyPatch, dtype: tuple[str, str]) -> None:
    """Traced as by the compiler, and run by ATen."""
    quick = functools.cache(functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiled_functions, "_compiled", quick)
    with compiled_functions.compiling():
        assert same(trained(spec_of("host", dtype)), trained(spec_of("device", dtype)))


# Memory

WIDE = LlamaConfig(256, 688, 16, 4, 4, 300)


def bytes_of(config: LlamaConfig, size: int = 2) -> tuple[int, int]:
    """Of a block's weights, and of embedding, final norm and head."""
    counts = {name: torch.Size(shape).numel() * size for name, shape in config.parameter_shapes()}
    block = sum(count for name, count in counts.items() if name.startswith("model.layers.0."))
    return block, sum(count for name, count in counts.items() if ".layers." not in name)


class Meter(StepMeter):  # type: ignore[no-untyped-call]
    """Counts no tensor without memory, of which a model consists before it is loaded."""

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._follow(storage)


def peak_of(spec: RunSpec, config: LlamaConfig, ranks: Ranks) -> tuple[int, int]:
    """The most bytes of tensors while a learner is built, and during its second update."""
    with Meter() as meter:
        learner = learner_of(spec, config, ranks)
        loading = meter.peak_bytes
        passes = [samples(6) for _ in range(ranks.size)]
        make_update(learner, passes, spec.training, 0, 0.02, ranks=ranks)
        meter.start_window()
        make_update(learner, passes, spec.training, 1, 0.02, ranks=ranks)
    return loading, meter.peak_bytes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_holds_its_slices_two_blocks_and_what_is_trained(size: int) -> None:
    spec = spec_of("shard", ("bfloat16", "bf16"))
    block, others = bytes_of(WIDE)
    adapter = sum(parameter.nbytes for parameter in learner_of(spec_of("device"), WIDE).parameters.values())
    weights = WIDE.num_hidden_layers * block // size + 2 * block + others
    for loading, peak in in_threads(size, lambda ranks: peak_of(spec, WIDE, ranks)):
        assert peak == pytest.approx(weights + 5 * adapter, rel=0.05)
        assert loading < weights + 2 * adapter + 3 * 2 * 256 * 688 * 2, "beside all of it one drawn matrix in fp32"


@pytest.mark.parametrize("placement", ["host", "shard"])
@pytest.mark.parametrize("dtype", [("bfloat16", "bf16"), ("nf4", "bf16"), ("float32", "fp32")])
def test_the_plan_is_what_a_step_needs(placement: str, dtype: tuple[str, str]) -> None:
    spec = spec_of(placement, dtype, gradient_accumulation_steps=1)
    batch = samples(150, 140)
    with Meter() as meter:
        learner = learner_of(spec, WIDE)
        make_update(learner, [batch], spec.training, 0, 0.02)
        meter.start_window()
        make_update(learner, [batch], spec.training, 1, 0.02)
    planned = step_bytes(spec, WIDE, Rows(batch.lengths, batch.target_tokens), cuda=False)
    assert planned.peak == pytest.approx(meter.peak_bytes, rel=0.05)


@pytest.mark.parametrize("size", [2, 4])
def test_loading_a_slice_holds_no_more_than_it_and_rows_of_one_tensor(
    tiny_base: Callable[..., Path], meta_copy: Callable[..., Path], size: int
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 268, "num_hidden_layers": 6, "num_attention_heads": 4}
    base = tiny_base(**shape, num_key_value_heads=2, vocab_size=132)
    for path in (base, meta_copy(base, 2)):
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        block, others = bytes_of(config, 4)

        def load(ranks: Ranks, checkpoint: Any = checkpoint) -> int:
            device = torch.device("cpu")
            layout = BlockLayout(checkpoint.config, torch.float32, None)
            with Meter() as meter:
                store = ShardedBlocks(layout.layers, layout.bytes, device, ranks)
                streamed = StreamedBlocks(layout, store, device)
                load_model(checkpoint, torch.float32, device, streamed=streamed, writable=True)
            return meter.peak_bytes

        # The largest tensor; rows of Meta's shards are held once more when they are joined.
        most = 6 * block // size + 2 * block + others + 268 * 128 * 4 * (1 if path == base else 2)
        assert max(in_threads(size, load)) <= 1.01 * most


# Whole runs


Run = Callable[..., RunSpec]


@pytest.fixture
def run_of(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Run:
    """A run with dropout, a validation split and a tail window."""

    def make(name: str, placement: str = "device", base: Path | None = None, **changes: Any) -> RunSpec:
        changes = {"training__micro_batch_size": 2, "training__gradient_accumulation_steps": 4,
                   "training__num_epochs": 2, "training__tokens_per_pass": None, **changes}  # fmt: skip
        data = prepared(validation_fraction=0.25, seed=3)
        return make_spec(base or tiny_base(), data, tmp_path / name, model__placement=placement, **changes)

    return make


def test_a_run_may_go_on_with_another_placement(run_of: Run, tmp_path: Path) -> None:
    whole = run_of("whole")
    train(whole)
    for place, placement in enumerate(("host", "device", "shard", "auto")):
        stop = StopAfter(1 + place % 2)
        with pytest.raises(Stopped):
            train(run_of("parts", placement), on_event=stop.on_event, should_stop=stop.should_stop)
    train(run_of("parts", "host"))
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_shards_and_packing(
    run_of: Run, tiny_base: Callable[..., Path], meta_copy: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    base = meta_copy(tiny_base(vocab_size=132), shards)
    how = {"base": base, "data__packing": True, "data__packed_tokens": 60, "model__dtype": "bfloat16",
           "training__precision": "bf16", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}  # fmt: skip
    train(run_of("device", **how))
    for placement in ("host", "shard"):
        train(run_of(placement, placement, **how))
        assert_same_outcome(tmp_path / placement, tmp_path / "device")


QWEN: dict[str, Any] = {"model_type": "qwen3", "attention_bias": True, "head_dim": 10}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(("placement", "dtype"), [("host", "float32"), ("shard", "nf4")])
def test_biases_and_norms_of_heads(
    run_of: Run, tiny_base: Callable[..., Path], tmp_path: Path, placement: str, dtype: str, fused: bool
) -> None:
    how = {"base": tiny_base(**QWEN), "model__dtype": dtype, "training__fused": fused, "training__max_steps": 3,
           "training__num_epochs": None, "lora": {"r": 4, "target_modules": ["q_proj", "o_proj"]}}  # fmt: skip
    for name in ("device", placement):
        train(run_of(name, name, **how))
    assert_same_outcome(tmp_path / placement, tmp_path / "device")


@pytest.mark.parametrize("dtype", ["float32", "nf4", "float8"])
@pytest.mark.parametrize(
    ("shards", "changes"), [(0, {}), (2, {"vocab_size": 132}), (0, QWEN)], ids=["", "two of Meta's", "qwen 3"]
)
def test_slices_of_a_checkpoint_give_its_logits(
    tiny_base: Callable[..., Path], meta_copy: Callable[..., Path], dtype: str, shards: int, changes: dict[str, Any]
) -> None:
    base = meta_copy(tiny_base(**changes), shards) if shards else tiny_base(**changes)
    ids, packed, device = torch.randint(3, 131, (2, 9)), QUANTIZATIONS.get(dtype), torch.device("cpu")

    def logits(streamed: StreamedBlocks | None) -> Tensor:
        checkpoint = open_checkpoint(base)
        config = checkpoint.config
        quantized = packed and QuantizedBase(dtype, checkpoint, config, device, ignore_event, never_stop)
        model = load_model(checkpoint, torch.float32, quantized=quantized, streamed=streamed)
        if streamed is not None:
            streamed.attach(model)
        return model(ids)  # type: ignore[no-any-return]

    def of_rank(ranks: Ranks) -> Tensor:
        layout = BlockLayout(open_checkpoint(base).config, torch.float32, packed)
        store = ShardedBlocks(layout.layers, layout.bytes, device, ranks)
        return logits(StreamedBlocks(layout, store, device))

    expected = logits(None)
    for found in in_threads(4, of_rank):
        assert torch.equal(found, expected)


def test_weights_that_are_not_finite_are_named_whoever_holds_them(
    tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][-1, -1] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    def notices(ranks: Ranks) -> list[str]:
        said: list[str] = []
        layout = BlockLayout(open_checkpoint(base).config, torch.float32, None)
        store = ShardedBlocks(layout.layers, layout.bytes, torch.device("cpu"), ranks)
        streamed = StreamedBlocks(layout, store, torch.device("cpu"))
        load_model(base, torch.float32, streamed=streamed, on_event=lambda event: said.append(str(event)))
        return [line for line in said if "NaN" in line]

    for said in in_threads(4, notices):
        assert len(said) == 1
        assert "model.layers.2.mlp.down_proj.weight" in said[0]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=8, temperature=0), Sampling(max_new_tokens=8, num_beams=3)]
)
def test_generation(sampling: Sampling) -> None:
    prompts = [[1, 5, 9], [1, 7]]

    def answers(spec: RunSpec, ranks: Ranks = ALONE) -> list[list[int]]:
        learner = learner_of(spec_of(spec.model.placement, fused=False), ranks=ranks)
        model = learner.model.eval()
        return [completion.ids for completion in complete(model, prompts, sampling, ())]

    expected = answers(spec_of("device"))
    assert answers(spec_of("host")) == expected
    for found in in_threads(2, lambda ranks: answers(spec_of("shard"), ranks)):
        assert found == expected


def train_in_processes(size: int, tmp_path: Path, specs: Sequence[RunSpec]) -> None:
    """Train the specs one after another in ``size`` processes that meet over gloo."""
    paths = []
    for number, spec in enumerate(specs):
        paths.append(tmp_path / f"spec-{number}.yaml")
        paths[-1].write_text(spec.to_yaml())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    there = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).with_name("train_ranks.py")), *map(str, paths)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **there, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, errors


SHARDED: dict[str, dict[str, Any]] = {
    "ragged rows": {},
    "nf4": {"model__dtype": "nf4", "training__precision": "bf16", "training__fused": False},
    "packed": {"data__packing": True, "data__packed_tokens": 60},
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_with_slices_give_the_run_of_one(run_of: Run, tmp_path: Path, size: int) -> None:
    """With dropout, validation and a window that leaves ranks idle; and host memory on every rank."""
    alone = {name: run_of(f"{name} alone", **changes) for name, changes in SHARDED.items()}
    apart = {name: run_of(f"{name} apart", "shard", **changes) for name, changes in SHARDED.items()}
    apart["host"] = run_of("host", "host")
    train_in_processes(size, tmp_path, list(apart.values()))
    for spec in alone.values():
        train(spec)
    assert metrics(tmp_path / "nf4 alone", "eval")
    for name in SHARDED:
        assert_same_outcome(tmp_path / f"{name} apart", tmp_path / f"{name} alone")
    assert_same_outcome(tmp_path / "host", tmp_path / "ragged rows alone")


@pytest.mark.parametrize("placement", ["host", "shard"])
def test_a_run_that_trains_every_parameter_is_refused(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, placement: str
) -> None:
    with pytest.raises(SpecError, match="frozen weights; add a lora section") as raised:
        make_spec(tiny_base(), prepared(), tmp_path / "run", lora=None, model__placement=placement)
    assert "\n" not in str(raised.value)


# The choice


@pytest.mark.parametrize(
    ("ranks", "device", "fits", "expected"),
    [(1, "cuda", True, "device"), (1, "cuda", False, "host"), (2, "cuda", True, "device"), (2, "cuda", False, "shard"),
     (1, "cpu", False, "device"), (2, "cpu", False, "shard")],
)  # fmt: skip
def test_auto_takes_the_device_where_a_step_fits(ranks: int, device: str, fits: bool, expected: str) -> None:
    asked: list[str] = []

    def says(spec: RunSpec) -> bool:
        asked.append(spec.model.placement)
        return fits

    assert choose_placement(spec_of("auto"), says, device, ranks).model.placement == expected
    assert asked == ["device"] * (ranks > 1 or device == "cuda")
    for given in ("device", "host", "shard"):
        assert choose_placement(spec_of(given), says, device, ranks) == spec_of(given)


def test_a_run_says_where_its_base_lies(run_of: Run) -> None:
    for placement, words in (("host", "host memory"), ("shard", "slices on all ranks"), ("auto", None)):
        summary, events = run_and_record(run_of(placement, placement))
        said = [event.message for event in events if isinstance(event, Notice) and "frozen weights" in event.message]
        assert [words in line for line in said] == ([] if words is None else [True])
        assert summary["placement"] == ("device" if placement == "auto" else placement)

"""The run spec: scalars as people mean them, every fault at once, and nothing silently ignored."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llamatune
from llamatune.errors import SpecError
from llamatune.spec import RunSpec, _section, build_spec, known_fields, load_spec
from llamatune.spec_overrides import RIVALS, refuse_twice
from llamatune.strict_yaml import parse_yaml

MINIMAL = """
model: {path: base}
lora: {}
data: {train: prepared}
training: {output_dir: runs/a}
"""


def spec(*overrides: str, text: str = MINIMAL) -> RunSpec:
    return build_spec(parse_yaml(text, "run.yaml"), "run.yaml", list(overrides))


def refusal(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(SpecError) as caught:
        spec(*overrides, text=text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_documented_defaults_hold() -> None:
    made = spec()
    assert (made.lora.r, made.lora.alpha, made.lora.dropout) == (16, 32, 0.05)  # type: ignore[union-attr]
    assert made.lora.target_modules == ("q_proj", "v_proj")  # type: ignore[union-attr]
    training = made.training
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (1, 8)
    assert (made.usual_learning_rate, training.precision, training.keep_last) == (3e-4, "bf16", 2)
    assert (made.model.dtype, made.data.shuffle, training.max_grad_norm) == ("bfloat16", True, 1.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), (".5", 0.5), ("1e-05", 1e-5), ("2", 2.0), ("1_000.5", 1000.5)],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert spec(f"training.learning_rate={text}").training.learning_rate == value


def test_octal_sexagesimal_and_no_are_what_they_look_like() -> None:
    assert spec("training.seed=010").training.seed == 10
    assert spec("model.path=no").model.path == "no"
    assert "valid integer" in refusal("lora.r=1:30")
    assert "valid boolean" in refusal("data.shuffle=yes")


def test_every_fault_is_reported_at_once_with_its_key_path() -> None:
    message = refusal("training.lerning_rate=1", "lora.rr=3", "model.dtype=fp8", "training.seed=-1")
    for part in (
        "4 errors",
        "training.lerning_rate: unknown key, did you mean 'learning_rate'?",
        "lora.rr",
        "model.dtype",
    ):
        assert part in message


@pytest.mark.parametrize(("text", "written"), [("3", "3"), ("3.0", "3"), ("0.5", "0.5"), ("2.5e0", "2.5")])
def test_a_number_of_epochs_may_be_a_fraction_and_a_whole_one_is_written_as_before(text: str, written: str) -> None:
    made = spec(f"training.num_epochs={text}")
    assert f"num_epochs: {written}\n" in made.to_yaml()
    assert build_spec(yaml.safe_load(made.to_yaml()), "test") == made


def test_a_whole_section_is_left_out_or_replaced() -> None:
    adapter = "lora: {r: 8, dropout: 0.1}"
    text = MINIMAL.replace("lora: {}", adapter) + "evaluation: {every_steps: 5}\n"
    assert spec("lora=null", "model.dtype=float32", text=text).lora is None
    assert spec("lora=", "model.dtype=float32", text=text).lora is None
    assert spec("evaluation=null", text=text).evaluation.every_steps is None
    replaced = spec("lora={lora_alpha: 3}", text=text).lora
    assert replaced is not None
    assert (replaced.r, replaced.alpha, replaced.dropout) == (16, 3, 0.05)
    added = spec("lora={}", "model.dtype=float32", text=text.replace(adapter, "")).lora
    assert added is not None
    empty = text.replace(adapter, "lora:")
    assert "lora: empty" in refusal("model.dtype=float32", text=empty)
    assert spec("lora=null", "model.dtype=float32", text=empty).lora is None
    assert (found := spec("lora.r=3", text=empty).lora) is not None
    assert found.r == 3
    with pytest.raises(SpecError, match="lora is given 2 times"):
        refuse_twice(["lora=null", "lora.r=8"])


FILE = """
model: {path: base, dtype: nf4, quantized_cache: cache}
lora: {ranks: {q_proj: 8}, kind: dora, init_from: adapter}
data: {train: prepared}
training: {output_dir: runs/a, num_epochs: 3, warmup_steps: 10, optimizer: sgd, momentum: 0.9, nesterov: true,
  min_learning_rate: 1e-6, learning_rate: 1e-4, fused: false}
evaluation: {early_stopping_patience: 2, early_stopping_min_delta: 0.1}
"""


@pytest.mark.parametrize(
    ("override", "undone"),
    [
        ("training.max_steps=5", "training.warmup_steps=0"),
        ("training.momentum=0.0", "training.nesterov=false"),
        ("training.learning_rate=1e-7", "training.min_learning_rate=0.0"),
        ("training.activation_checkpointing=projections", "training.fused=true"),
        ("lora.target_modules=[v_proj]", "'lora.ranks={}'"),
        ("lora.init=gaussian", "lora.init_from=null"),
        ("evaluation.early_stopping_patience=null", "evaluation.early_stopping_min_delta=0.0"),
        ("model.dtype=bfloat16", "model.quantized_cache=null"),
    ],
)
def test_an_override_against_the_file_says_how_to_undo_what_the_file_says(override: str, undone: str) -> None:
    message = refusal(override, text=FILE)
    assert message.endswith(f": on the command line: undo what the file says with {undone}")
    spec(override, *undone.replace("'", "").split(), text=FILE)


def test_the_page_of_the_spec_says_what_an_override_does_to_the_file() -> None:
    """Its pairs replace each other, no others do, and its example is refused with the advice that it has."""
    page = " ".join((Path(__file__).parents[1] / "docs/run-spec.md").read_text(encoding="utf-8").split())
    pairs = re.search(r"Of `(\w+)` and `(\w+)`, and of `(\w+)` and `(\w+)`, the one on the command line takes", page)
    assert pairs is not None
    assert {(pairs[1], pairs[2]), (pairs[3], pairs[4])} == {tuple(pair) for _, *pair in RIVALS}
    assert {section for section, *_ in RIVALS} == {"training"}
    example = re.search(r"of a file with `nesterov: true`, `(\S+)` needs `(\S+)` beside it", page)
    assert example is not None
    assert refusal(example[1], text=FILE).endswith(f"undo what the file says with {example[2]}")


def test_an_override_takes_the_place_of_its_rival() -> None:
    """Of the file. Two overrides that exclude each other are a fault."""
    text = MINIMAL.replace("runs/a", "runs/a, num_epochs: 3, warmup_steps: 4")
    training = spec("training.max_steps=20", "training.warmup_ratio=0.1", text=text).training
    assert (training.num_epochs, training.max_steps) == (None, 20)
    assert (training.warmup_steps, training.warmup_ratio) == (0, 0.1)
    back = spec(
        "training.num_epochs=2", "training.warmup_steps=3",
        text=MINIMAL.replace("runs/a", "runs/a, max_steps: 20, warmup_ratio: 0.1"),
    ).training  # fmt: skip
    assert (back.num_epochs, back.max_steps) == (2, None)
    assert (back.warmup_steps, back.warmup_ratio) == (3, None)
    assert spec("training.max_steps=null", text=text).training.num_epochs == 3
    both = refusal("training.max_steps=20", "training.num_epochs=2")
    assert both.endswith("num_epochs and max_steps exclude each other: on the command line")
    assert refusal(text=text.replace("num_epochs", "max_steps: 5, num_epochs")).endswith(": run.yaml")


def test_a_fault_is_blamed_on_where_it_is() -> None:
    """The file, the command line, or each fault on its own."""
    assert refusal("training.device=gpu").endswith(
        "training.device: should be auto, cpu, cuda or cuda:N (it is 'gpu'): on the command line"
    )
    assert refusal("optimizer.lr=1").endswith(": on the command line")
    text = MINIMAL.replace("runs/a", "runs/a, device: tpu")
    assert refusal(text=text).endswith("(it is 'tpu'): run.yaml")
    assert refusal("training.device=gpu", text=text).endswith("(it is 'gpu'): on the command line")
    mixed = refusal("training.seed=-1", text=text)
    assert mixed.startswith("2 errors: ")
    assert "training.seed: should be greater than or equal to 0 (it is -1) (on the command line); " in mixed
    assert mixed.endswith("(it is 'tpu'): run.yaml")
    assert refusal("lora=null").endswith(": on the command line"), "the file's bfloat16 was right before"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "training.learning_rate='1e-4'",
            "should be a valid number above 0, auto or null (it is '1e-4'), write it without quotes",
        ),
        ("training.num_epochs='3'", "should be a valid number (it is '3'), write it without quotes"),
        ("training.seed='7'", "should be a valid integer (it is '7'), write it without quotes"),
        ("training.compile='true'", "should be a valid boolean (it is 'true'), write it without quotes"),
        ("training.tokens_per_pass='64'", "should be a valid integer or 'auto' (it is '64'), write it without quotes"),
    ],
)
def test_a_number_in_quotes_is_told_from_another_text(override: str, told: str) -> None:
    assert f"{override.partition('=')[0]}: {told}: " in refusal(override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.path=''", "model.path: should have at least 1 character (it is '')"),
        ("training.betas=[0.9]", "training.betas (value 2): missing: on the command line"),
        ("training.seed=x", "should be a valid integer (it is 'x')"),
        ("training.tokens_per_pass=0", "should be greater than or equal to 1 or 'auto' (it is 0)"),
        ("training.precision=fp8", "should be 'fp32', 'tf32', 'bf16' or 'fp16' (it is 'fp8')"),
        ("lora.r=4097", "should be less than or equal to 4096 (it is 4097)"),
        ("lora.ranks={q_proj: x}", "lora.ranks.q_proj: should be a valid integer (it is 'x')"),
    ],
)  # fmt: skip
def test_faults_are_told_in_words(override: str, told: str) -> None:
    message = refusal(override)
    assert told in message
    assert not any(word in message for word in ("Input", "String", "pattern", "constrained", "literal", "Tuple"))


@pytest.mark.parametrize("override", ["training.learning_rate=fast", "training.seed='1.5'", "data.shuffle=yes"])
def test_a_text_that_is_no_such_number_has_no_advice_about_quotes(override: str) -> None:
    assert "without quotes" not in refusal(override)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora.rank", "'r'"), ("lora.lora_r", "'r'"), ("training.lora_r", "'lora.r'"), ("lora.use_dora", "kind: dora"),
        ("training.lr", "'learning_rate'"), ("training.batch_size", "'micro_batch_size'"),
        ("training.epochs", "'num_epochs'"),
        ("training.per_device_train_batch_size", "'micro_batch_size'"), ("training.optim", "'optimizer'"),
        ("training.fp16", "training.precision: fp16"), ("model.load_in_4bit", "model.dtype: nf4"),
        ("training.gradient_checkpointing", "'activation_checkpointing'"), ("training.r", "'lora.r'"),
        ("training.eval_steps", "'evaluation.every_steps'"), ("model.model_name_or_path", "'path'"),
        ("trainig.seed", "'training'"), ("training.learnig_rate", "'learning_rate'"),
    ],
)  # fmt: skip
def test_keys_of_other_programs_are_known_by_name(key: str, meant: str) -> None:
    path = key if key.partition(".")[0] in RunSpec.model_fields else key.partition(".")[0]
    assert f"{path}: unknown key, did you mean {meant}?" in refusal(f"{key}=1")


def test_names_of_other_programs_stand_for_keys_that_there_are() -> None:
    from llamatune.spec_faults import _OF_OTHERS, _OURS

    flat = {f"{section}.{key}" for section in RunSpec.model_fields for key in _section(section).model_fields}
    assert _OF_OTHERS.keys() <= flat
    assert len(_OURS) == sum(len(names.split()) for names in _OF_OTHERS.values()), "a name stands for two keys"
    assert "prepare-data --max-seq-length" in refusal("training.max_seq_length=512")


@pytest.mark.parametrize("override", ["training.min_learning_rate=1.0", "lora.r=0", "model.dtype=fp8", "lora=null"])
def test_what_the_file_is_not_to_blame_for_names_nothing_of_it(override: str) -> None:
    assert "undo" not in refusal(override, text=FILE)


def test_a_file_that_contradicts_itself_is_not_set_against_an_override() -> None:
    assert "undo" not in refusal("training.seed=1", text=FILE.replace("num_epochs: 3", "num_epochs: 3, max_steps: 9"))


def test_pefts_spellings_are_accepted_but_not_beside_ours() -> None:
    made = spec(text=MINIMAL.replace("lora: {}", "lora: {lora_alpha: 8, lora_dropout: 0.2}"))
    assert (made.lora.alpha, made.lora.dropout) == (8, 0.2)  # type: ignore[union-attr]
    assert "are the same" in refusal(text=MINIMAL.replace("lora: {}", "lora: {lora_alpha: 8, alpha: 8}"))
    assert spec("lora.lora_alpha=4", text=MINIMAL.replace("{}", "{alpha: 8}")).lora.alpha == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora.target_modules=[qproj]", "did you mean 'q_proj'?"),
        ("lora.target_modules=[]", "names no layer"),
        ("lora.target_modules=[q_proj, q_proj]", "names a layer twice"),
        ("lora.r=0", "lora.r"),
        ("lora.r=true", "valid integer"),
        ("lora.dropout=1", "lora.dropout"),
        ("lora.kind=adalora", "lora.kind"),
        ("lora.ranks={k_proj: 8}", "lora: ranks names 'k_proj', which is none of lora.target_modules: q_proj, v_proj"),
        ("lora.ranks.q_proj=0", "lora.ranks.q_proj"),
        ("lora.alphas={v_proj: 0.0}", "lora.alphas.v_proj"),
        ("lora.lr_ratio=0.0", "lora.lr_ratio"),
        ("lora.init=loftq", "lora.init"),
        ("training.learning_rate=.nan", "valid number"),
        ("training.learning_rate=.inf", "valid number"),
        ("training.learning_rate='1e-4'", "valid number"),
        ("training.activation_checkpointing=every_1", "every_2"),
        ("training.activation_checkpointing=every_x", "every_2"),
        ("training.device=tpu", "training.device"),
        ("training.nesterov=true", "nesterov needs momentum"),
        ("training.min_learning_rate=1", "is above learning_rate"),
        ("model.path=", "model.path"),
        ("seed=1", "section.key=value"),
        ("training", "section.key=value"),
        ("training.output_dir=~", "should be a valid string (it is null, as ~ alone is in YAML)"),
        ("lora.r=null", "valid integer (it is null)"),
        ("lora=off", "section=null to leave a section out"),
        ("model=null", "model: missing"),
        ("seed=null", "seed: unknown key"),
        ("training.num_epochs=0", "training.num_epochs: should be greater than 0"),
        ("training.num_epochs=true", "valid number"),
        ("training.num_epochs=1e308", "training.num_epochs: should be less than or equal to 1000000000"),
        (f"training.max_steps=1{'0' * 400}", "training.max_steps: should be less than"),
    ],
)
def test_what_means_nothing_is_refused(override: str, part: str) -> None:
    assert part in refusal(override)


@pytest.mark.parametrize(("key", "sign"), [("max_steps", 1), ("learning_rate", -1), ("seed", 1)])
def test_a_number_that_python_does_not_write_is_a_fault_like_others(key: str, sign: int) -> None:
    value = sign * 10**5000
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o", key: value}}
    with pytest.raises(SpecError, match=rf"training\.{key}: .*beyond the range of numbers"):
        build_spec(values, "the spec")


def test_fields_that_exclude_each_other() -> None:
    assert "exclude each other" in refusal("training.max_steps=5", "training.num_epochs=1")
    assert "exclude each other" in refusal("training.warmup_steps=5", "training.warmup_ratio=0.1")
    assert "longer than the run" in refusal("training.max_steps=5", "training.warmup_steps=6")


def test_kinds_of_adapter_that_exclude_each_other() -> None:
    assert "init: pissa is for kind: lora, not dora" in refusal("lora.init=pissa", "lora.kind=dora")
    assert "init: olora is for kind: lora, not lora_fa" in refusal("lora.init=olora", "lora.kind=lora_fa")
    assert "exclude each other" in refusal("lora.init=gaussian", "lora.init_from=adapter")
    assert "does not train A" in refusal("lora.kind=lora_fa", "lora.lr_ratio=16.0")


def test_spellings_of_peft() -> None:
    made = spec("lora.rank_pattern.q_proj=8", "lora.alpha_pattern={v_proj: 3.0}").lora
    assert made is not None
    assert (made.ranks, made.alphas) == ({"q_proj": 8}, {"v_proj": 3.0})
    assert "did you mean kind: dora?" in refusal("lora.use_dora=true")
    assert "did you mean 'init'?" in refusal("lora.init_lora_weights=pissa")
    for second in ("lora.rank_pattern={q_proj: 9}", "lora.ranks.v_proj=9"):
        with pytest.raises(SpecError, match=r"lora\.ranks is given 2 times"):
            refuse_twice(["lora.ranks={q_proj: 8}", second])
    refuse_twice(["lora.ranks.q_proj=8", "lora.ranks.v_proj=9"])


def test_the_kind_and_its_ranks_reach_the_adapter() -> None:
    adapter = spec("lora.kind=dora", "lora.ranks.q_proj=8", "lora.alphas={v_proj: 3.0}", "lora.use_rslora=true").adapter
    assert adapter is not None
    assert (adapter.kind, adapter.rank("q_proj"), adapter.rank("v_proj")) == ("dora", 8, 16)
    assert adapter.scaling("v_proj") == 3 / 4
    started = spec("lora.init=pissa").adapter
    assert started is not None
    assert (started.kind, started.stored().kind, started.stored().r, started.stored().alpha) == (
        "pissa",
        "lora",
        32,
        64,
    )


def test_training_everything_in_sixteen_bits_is_refused_with_the_reason() -> None:
    full = MINIMAL.replace("lora: {}\n", "")
    assert "loses small updates" in refusal(text=full)
    assert spec("model.dtype=float32", text=full).lora is None


def test_all_linear_is_the_seven_and_a_string_may_hold_commas() -> None:
    assert len(spec("lora.target_modules=all-linear").lora.target_modules) == 7  # type: ignore[union-attr]
    made = spec("lora.target_modules='v_proj, q_proj'")
    assert made.lora.target_modules == ("q_proj", "v_proj")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &x [1]\nb: *x", "anchors and aliases"),
        ("model: !!python/object/apply:os.system [true]", "tags are not allowed"),
        ("model: {path: a}\nmodel: {path: b}", "appears twice"),
        ("model: {path: a, path: b}", "appears twice"),
        ("a: [1", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("- a", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_yaml_that_is_hostile_or_broken_is_one_line(text: str, part: str) -> None:
    assert part in refusal(text=text)


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        load_spec(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="directory"):
        load_spec(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(SpecError, match="more than"):
        load_spec(tmp_path / "big.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: caf\xe9}")
    with pytest.raises(SpecError, match="not UTF-8 at byte 17"):
        load_spec(tmp_path / "latin.yaml")


def test_the_resolved_spec_reads_back_equal(tmp_path: Path) -> None:
    made = spec("training.learning_rate=3e-4", "training.betas=[0.9, 0.95]", "lora.target_modules=all-linear")
    (tmp_path / "spec.yaml").write_text(made.to_yaml(), encoding="utf-8")
    assert load_spec(tmp_path / "spec.yaml") == made


def test_a_json_spec_is_a_yaml_spec(tmp_path: Path) -> None:
    text = '{"model": {"path": "base"}, "lora": {}, "data": {"train": "p"}, "training": {"output_dir": "r"}}'
    (tmp_path / "spec.json").write_text(text, encoding="utf-8")
    assert load_spec(tmp_path / "spec.json").model.path == "base"


def test_errors_come_before_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("output_dir", "output_dri"), encoding="utf-8")
    code = (
        "import sys\nfrom llamatune.cli import main\n"
        f"try: main(['train', {str(tmp_path / 'run.yaml')!r}])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean 'output_dir'?" in done.stderr
    assert done.stderr.count("\n") == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.dictionaries(st.sampled_from(["model", "lora", "data", "training", "evaluation", "tracking", "x"]), VALUES))
def test_any_values_give_a_spec_or_one_line(values: dict[str, Any]) -> None:
    try:
        build_spec(values, "run.yaml")
    except SpecError as fault:
        assert "\n" not in str(fault)


@given(st.text(max_size=60))
def test_any_text_gives_values_or_one_line(text: str) -> None:
    try:
        parse_yaml(text, "run.yaml")
    except SpecError as fault:
        assert "\n" not in str(fault)


def test_every_field_of_the_contract_is_there() -> None:
    made = yaml.safe_load(spec().to_yaml())
    assert set(made) == {"model", "lora", "data", "training", "evaluation", "tracking"}
    assert {"memory_limit", "compile", "log_every_steps", "save_every_steps", "warmup_ratio"} <= set(made["training"])


@pytest.mark.parametrize("betas", [{0.9, 0.99}, frozenset((0.9, 0.99)), iter((0.9, 0.99)), {0.9: 1, 0.99: 2}])
def test_betas_need_an_order(betas: object) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o", "betas": betas}}
    with pytest.raises(SpecError, match=r"training\.betas: should be a list"):
        build_spec(values, "the spec")


def test_fields_that_may_change_are_keys_of_the_spec() -> None:
    names = ["lora.lora_alpha", "lora.ranks.q_proj", "lora", "training.seed"]
    assert known_fields(names, "--x") == ("lora.alpha", "lora.ranks.q_proj", "lora", "training.seed")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("training.sead", "training.sead, did you mean 'seed'?"),
        ("bogus", "bogus"),
        ("seed", "seed, did you mean 'training.seed'?"),
        ("", "''"),
        ("training.seed.x", "'training.seed.x'"),
        ("training.seed=1", "training.seed=1, did you mean 'seed'?"),
    ],
)
def test_a_field_that_is_no_key_is_named(name: str, told: str, command: Callable[..., Any]) -> None:
    done = command("train", "absent.yaml", "--allow-spec-change", "training.eps", "--allow-spec-change", name)
    wanted = f"error: no key of the spec: {told}: --allow-spec-change: write it as training.learning_rate\n"
    assert (done.code, done.stderr) == (2, wanted)
    with pytest.raises(SpecError, match="allow_spec_change: write it as"):
        llamatune.train("absent.yaml", allow_spec_change=name)


def test_escaped_surrogates_of_yaml_are_one_character_in_pairs_and_refused_alone() -> None:
    assert parse_yaml('{"a\\ud83d\\ude00": "\\ud83d\\ude00 b"}', "f") == {"a😀": "😀 b"}
    for lone in ("\\ud800", "\\ude00\\ud83d", "a\\udfff"):
        for text in (f'{{"key": "{lone}"}}', f'{{"{lone}": 1}}', f'- "{lone}"'):
            with pytest.raises(SpecError, match=r"not valid YAML: a lone surrogate, .* \(line 1\): f"):
                parse_yaml(text, "f")

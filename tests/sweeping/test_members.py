"""Which runs a sweep has, what they are called, and which of them can be trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llamatune.command_options.sweep import SweepOptions
from llamatune.errors import EnvironmentFault, SpecError
from llamatune.sweeping.groups import groups, why_alone
from llamatune.sweeping.members import Member, member_names, plan_members

SPEC = {
    "model": {"path": "base"},
    "lora": {"r": 4},
    "data": {"train": "rows"},
    "training": {"output_dir": "run", "learning_rate": 1e-4},
}


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")
    path.write_text(yaml.safe_dump(SPEC))
    return path


def planned(spec: Path, *grid: str, overrides: tuple[str, ...] = (), **options: Any) -> list[Member]:
    return plan_members(SweepOptions(spec_path=spec, overrides=overrides, grid=grid, output=Path("out"), **options))[1]


def test_every_combination_is_a_run_with_a_directory_of_its_own(spec: Path) -> None:
    # `--grid A=1,2 B=3,4` reads as two axes, and is
    members = planned(spec, "lora.r=4,8", overrides=("training.learning_rate=1e-4,3e-4", "training.seed=7"))
    assert [member.name for member in members] == [
        "r=4,learning_rate=1e-4", "r=4,learning_rate=3e-4", "r=8,learning_rate=1e-4", "r=8,learning_rate=3e-4",
    ]  # fmt: skip
    for member in members:
        assert member.spec is not None
        assert member.spec.lora is not None
        assert member.path == Path("out/runs") / member.name
        assert member.spec.training.output_dir == str(member.path)
        assert member.spec.training.seed == 7
        assert member.values == {
            "lora.r": str(member.spec.lora.r), "training.learning_rate": f"{member.spec.training.learning_rate:.0e}"
            .replace("e-0", "e-"),
        }  # fmt: skip


def test_names_are_files_names_and_those_of_other_values_differ() -> None:
    modules = [{"lora.target_modules": value} for value in ("[q_proj,v_proj]", "[q_proj v_proj]", "all-linear")]
    names = member_names(modules)
    assert names[2] == "target_modules=all-linear"
    assert len(set(names)) == 3
    assert member_names([{"a.seed": "1", "training.seed": "2"}]) == ["a.seed=1,training.seed=2"]
    for name in member_names([{"data.train": "../../x"}, {"data.train": "/" * 300}, {"data.train": "\x1b[2J é"}]):
        assert name.isascii()
        assert "/" not in name
        assert len(name) < 120
    assert member_names([modules[0]]) == names[:1], "a name depends on its values alone"


@pytest.mark.parametrize(
    ("grid", "overrides", "told"),
    [
        ((), (), "nothing to try: --grid"),
        (("lora.r=4,8",), ("lora.r=2",), "lora.r is given 2 times"),
        (("lora.r=4,4",), (), "names a value twice"),
        (("lora.rank=4,8",), (), "did you mean 'r'"),
        (("training.output_dir=a,b",), (), "training.output_dir is set by --output"),
        (("lora.r=4,8",), ("training.output_dir=a",), "training.output_dir is set by --output"),
        (("lora.r=4,8",), ("training.sed=1",), "training.sed: unknown key"),
        (("lora.r",), (), "is no axis"),
        (
            ("lora.r=8,sixty",),
            (),
            r"no value of an axis: lora\.r: should be a valid integer .*: --grid lora\.r=8,sixty",
        ),
        (("lora.target_modules=q_proj,[foo]",), (), "no linear layer called 'foo'.*: --grid"),
        (("training.seed=1,2", "training.betas=[0.9,0.9],[0.9,2]"), (), r"betas \(value 2\): should be less than 1"),
        (("lora.r=4,'",), (), "not valid YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(spec: Path, grid: tuple[str, ...], overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        planned(spec, *grid, overrides=overrides)


def test_a_combination_that_is_no_spec_says_why(spec: Path) -> None:
    members = planned(spec, "lora=on,off", "model.dtype=float32,nf4")
    refused = [member for member in members if member.spec is None]
    assert [member.values for member in refused] == [{"lora": "off", "model.dtype": "nf4"}]
    assert "nf4 weights are frozen" in (refused[0].refusal or "")
    assert sum(map(len, groups(members))) == 3


def test_the_output_may_not_be_what_a_run_reads(spec: Path) -> None:
    Path("out").mkdir()
    with pytest.raises((SpecError, EnvironmentFault), match="--output"):
        planned(spec, "lora.r=4,8", overrides=("data.train=out/rows", "model.path=out"), overwrite=True)


def test_what_shares_base_rows_and_batch_is_one_group(spec: Path) -> None:
    together = planned(
        spec, "lora.r=4,8", "training.learning_rate=1e-4,1e-3", "training.seed=1,2", "training.optimizer=adamw,sgd",
        "data.shuffle=true,false", "lora.dropout=0,0.1", "lora.target_modules=[q_proj],all-linear",
        "training.num_epochs=1,2",
    )  # fmt: skip
    assert [len(group) for group in groups(together)] == [256]
    apart = planned(spec, "training.micro_batch_size=1,2", "model.dtype=bfloat16,float32", "data.train=rows,others")
    assert [len(group) for group in groups(apart)] == [1] * 8
    for axis in ("model.path=a,b", "training.gradient_accumulation_steps=1,2", "training.precision=fp32,bf16",
                 "training.activation_checkpointing=none,block", "training.tokens_per_pass=64,128"):  # fmt: skip
        mixed = planned(spec, axis, "lora.r=4,8,16")
        assert [len(group) for group in groups(mixed)] == [3, 3], axis


def test_a_random_base_is_shared_by_runs_of_one_seed(spec: Path) -> None:
    drawn = planned(spec, "training.seed=1,2", "lora.r=2,3", overrides=("model.init=random",))
    assert [[member.name for member in group] for group in groups(drawn)] == [
        ["seed=1,r=2", "seed=1,r=3"], ["seed=2,r=2", "seed=2,r=3"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override",
    [
        "training.fused=false",
        "training.compile=true",
        "training.profile_steps=2",
        "tracking.wandb=offline",
        "lora.modules_to_save=[norm]",
        "model.placement=host",
        "lora.kind=dora",
        "lora=null",
    ],
)
def test_what_cannot_share_a_base_is_trained_alone(spec: Path, override: str) -> None:
    fixed = (override, "model.dtype=float32") if override == "lora=null" else (override,)
    members = planned(spec, "training.learning_rate=1e-4,1e-3", overrides=fixed)
    assert [len(group) for group in groups(members)] == [1, 1]
    assert members[0].spec is not None
    assert why_alone(members[0].spec)


def test_dora_shares_a_base_in_fp32(spec: Path) -> None:
    members = planned(spec, "lora.kind=lora,dora,lora_fa", overrides=("training.precision=fp32",))
    assert [len(group) for group in groups(members)] == [3]

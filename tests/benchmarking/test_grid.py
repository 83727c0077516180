"""Which cells a grid has, and which of them are refused."""

from __future__ import annotations

from typing import Any

import pytest

from llamatune.benchmarking.grid import comparisons, preset_grid, switch
from llamatune.errors import SpecError
from llamatune.spec import RunSpec
from llamatune.spec_grid import Axis, Grid, expand, is_axis, parse_axis


def values(**lora: Any) -> dict[str, Any]:
    return {
        "model": {"path": "base"},
        "lora": {"r": 4, **lora},
        "data": {"train": "rows"},
        "training": {"output_dir": "run", "micro_batch_size": 2},
    }


def specs(grid: Grid, overrides: list[str] | None = None) -> list[RunSpec | None]:
    return [cell.spec for cell in expand(values(), "spec.yaml", overrides or [], grid)]


def test_the_techniques_are_every_combination_the_plainest_first() -> None:
    grid = preset_grid("techniques", cuda=False)
    found = specs(grid)
    assert len(found) == 2 * 2 * 3 * 3
    assert all(spec is not None and spec.model.dtype == "float32" for spec in found)
    made = [
        (spec.lora is not None, spec.training.precision, spec.training.micro_batch_size,
         spec.training.gradient_accumulation_steps, spec.training.activation_checkpointing)
        for spec in found if spec is not None
    ]  # fmt: skip
    assert made[0] == (False, "fp32", 1, 1, "none")
    assert made[-1] == (True, "bf16", 1, 8, "block")
    assert len(set(made)) == 36
    assert {(micro, accumulated) for _, _, micro, accumulated, _ in made} == {(1, 1), (8, 1), (1, 8)}
    assert {spec.lora.r for spec in found if spec is not None and spec.lora is not None} == {4}, "the spec's own LoRA"
    cuda = preset_grid("techniques", cuda=True)
    assert len(specs(cuda)) == 54, "fp16 too"


def test_the_checkpointing_grid_leaves_the_spec_as_it_is_otherwise() -> None:
    found = specs(preset_grid("checkpointing", cuda=False))
    modes = [spec.training.activation_checkpointing for spec in found if spec is not None]
    assert modes == ["none", "attention", "feed_forward", "sublayer", "projections", "block", "every_2", "every_3"]
    assert {spec.model.dtype for spec in found if spec is not None} == {"bfloat16"}


def test_an_axis_replaces_the_presets_of_the_same_key_and_a_new_one_stands_behind() -> None:
    grid = preset_grid("techniques", cuda=False).with_axes([parse_axis("lora.r=2,8"), parse_axis("lora=on")])
    assert grid.axes[0].key == "lora"
    assert grid.axes[0].values == ("on",)
    assert grid.axes[-1] == Axis("lora.r", ("2", "8"))
    assert len(specs(grid)) == 1 * 2 * 3 * 3 * 2


def test_users_overrides_come_after_the_grids_own_and_before_its_axes() -> None:
    grid = Grid((parse_axis("training.precision=fp32,bf16"),), ("model.dtype=float32", "training.seed=1"))
    found = specs(grid, ["model.dtype=float16", "training.precision=fp16"])
    assert [(s.model.dtype, s.training.precision, s.training.seed) for s in found if s] == [
        ("float16", "fp32", 1), ("float16", "bf16", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "key", "found"),
    [
        ("lora=on,off", "lora", ("on", "off")),
        ("batch=1x8, 8x1", "batch", ("1x8", "8x1")),
        ("lora.target_modules=[q_proj,v_proj],all-linear", "lora.target_modules", ("[q_proj,v_proj]", "all-linear")),
        ("training.betas=[0.9, 0.95],[0.8,0.9]", "training.betas", ("[0.9, 0.95]", "[0.8,0.9]")),
    ],
)
def test_axes_are_read(text: str, key: str, found: tuple[str, ...]) -> None:
    assert parse_axis(text) == Axis(key, found)


def test_a_word_with_several_values_is_an_axis_and_one_with_one_is_an_override() -> None:
    words = ["lora.r=4,8", "lora=off", "batch=1x8", "lora.r=4", "training.max_steps=", "training.betas=[0.9,0.95]"]
    assert [is_axis(word) for word in words] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "text", ["lora", "=1,2", "lora.r=1,,2", "lora.r=", "lora.r=4,4", "lora=yes", "batch=8", "batch=0x1", "rank=1,2"]
)
def test_what_is_no_axis_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_axis(text)
    assert "\n" not in str(refused.value)


def test_combinations_that_make_no_spec_are_cells_with_a_reason() -> None:
    axes = tuple(map(parse_axis, ("lora=off,on", "model.dtype=bfloat16,float32", "lora.r=2,8")))
    cells = expand(values(), "spec.yaml", [], Grid(axes))
    assert [cell.spec is None for cell in cells] == [True] * 4 + [False] * 4
    assert cells[0].refusal == "lora.r says nothing with lora=off"
    alone = expand(values(), "spec.yaml", ["lora.r=8"], Grid(axes[:2]))
    assert [cell.spec is None for cell in alone] == [True, False, False, False]
    assert "loses small updates" in str(alone[0].refusal)
    assert alone[0].label == "lora=off, dtype=bfloat16"


def test_a_grid_without_one_valid_cell_is_a_fault_of_the_command() -> None:
    with pytest.raises(SpecError, match="did you mean 'precision'"):
        expand(values(), "spec.yaml", [], Grid((parse_axis("training.precison=fp32,bf16"),)))


def test_lora_on_gives_a_spec_without_the_section_its_defaults() -> None:
    plain = values()
    del plain["lora"]
    grid = Grid((parse_axis("lora=off,on"),), ("model.dtype=float32",))
    off, on = (cell.spec for cell in expand(plain, "spec.yaml", [], grid))
    assert off is not None
    assert off.lora is None
    assert on is not None
    assert on.lora is not None
    assert on.lora.r == 16
    assert "lora" not in plain, "what was given is left as it is"


def test_accumulation_is_compared_at_equal_micro_batch_and_at_equal_global_batch() -> None:
    assert comparisons(parse_axis("batch=1x1,8x1,1x8,2x4")) == [("1x1", "1x8"), ("8x1", "1x8"), ("8x1", "2x4")]
    assert comparisons(parse_axis("training.precision=fp32,bf16,fp16")) == [("fp32", "bf16"), ("fp32", "fp16")]


def test_values_as_reports_name_them() -> None:
    grid = preset_grid("techniques", cuda=False)
    assert [[switch(axis, value) for value in axis.values] for axis in grid.axes] == [
        ["OFF", "ON"], ["OFF", "ON bf16"], ["OFF 1x1", "OFF 8x1", "ON 1x8"], ["OFF", "ON every_2", "ON block"]
    ]  # fmt: skip
    assert switch(parse_axis("lora.r=4,8"), "4") == "4"


def test_lora_null_is_off_as_an_override_of_train_has_it() -> None:
    """In a file whose section is empty, too."""
    assert parse_axis("lora=null,{}") == parse_axis("lora=off,on")
    values = {"model": {"path": "m", "dtype": "float32"}, "lora": None, "data": {"train": "d"},
              "training": {"output_dir": "o"}}  # fmt: skip
    off, on = expand(values, "spec.yaml", ["lora.r=4"], Grid((parse_axis("lora=null,{}"),)))
    assert off.spec is not None
    assert off.spec.lora is None
    assert on.spec is not None
    assert on.spec.lora is not None
    assert on.spec.lora.r == 4

"""Files that change while in use: ours are replaced whole, and what is not ours can be read instead of mapped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from run_tools import assert_same_outcome, make_spec, spec_values

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.batches import open_prepared
from llamatune.data.prepare import prepare_data
from llamatune.training.train import train

_CUT_WHILE_TRAINING = """
import sys
from llamatune.events import StepDone
from llamatune.spec import load_spec
from llamatune.training.train import train

def cut(event):
    if isinstance(event, StepDone) and event.step == 1:
        open(sys.argv[2], "wb").close()

train(load_spec(sys.argv[1]), on_event=cut)
"""


def test_weights_that_are_read_may_vanish_while_they_are_used(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """Cut to nothing after the first step: mapped weights would end the process with SIGBUS."""
    base, spec = tmp_path / "base", tmp_path / "run.yaml"
    shutil.copytree(tiny_base(), base)
    train(make_spec(base, prepared(), tmp_path / "whole", model__memory_map=False))
    spec.write_text(yaml.safe_dump(spec_values(base, prepared(), tmp_path / "run", model__memory_map=False)))
    command = [sys.executable, "-c", _CUT_WHILE_TRAINING, str(spec), str(base / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (base / "model.safetensors").stat().st_size == 0
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_reading_or_mapping_weights_is_the_same_run(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    for name, mapped in (("mapped", True), ("read", False)):
        train(make_spec(tiny_base(), prepared(), tmp_path / name, model__memory_map=mapped))
    assert_same_outcome(tmp_path / "read", tmp_path / "mapped")


def test_a_product_that_is_replaced_stays_whole_for_who_has_it_open(
    tiny_rows: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    def prepare(length: int) -> None:
        options = PrepareOptions(
            rows=[tiny_rows], tokenizer=tiny_tokenizer, output=tmp_path / "data", max_seq_length=length,
            skip_bad_rows=99, overwrite=True,
        )  # fmt: skip
        prepare_data(options)

    prepare(48)
    old = open_prepared(tmp_path / "data").train
    before = [old.batch([i]).input_ids.clone() for i in range(len(old))]
    prepare(24)
    assert sum(open_prepared(tmp_path / "data").train.lengths) < sum(old.lengths)
    for i, ids in enumerate(before):
        torch.testing.assert_close(old.batch([i]).input_ids, ids, rtol=0, atol=0)

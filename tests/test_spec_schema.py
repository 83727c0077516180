"""The JSON schema of run specs: it is made from the spec, and accepts and refuses what the spec does."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamatune import documentation
from llamatune.errors import SpecError
from llamatune.spec import RunSpec, build_spec, load_spec
from llamatune.spec_overrides import ALIASES
from llamatune.spec_schema import EDITOR_LINE, SCHEMA_FILE, make_schema, read_schema, schema_text, spec_keys
from llamatune.strict_yaml import read_yaml

ROOT = Path(__file__).parents[1]
SMALLEST: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d"}, "training": {"output_dir": "o"}, "lora": {}}


def changed(key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(SMALLEST)
    section, _, name = key.partition(".")
    if name:
        values.setdefault(section, {})[name] = value
    else:
        values[section] = value
    return values


ACCEPTED = [
    ("lora.target_modules", "all-linear"), ("lora.target_modules", ["q_proj", "down_proj"]),
    ("lora.target_modules", "q_proj, v_proj"), ("lora.target_modules", ["all-linear"]), ("lora.modules_to_save", []),
    ("lora.modules_to_save", ["norm"]), ("lora.lora_alpha", 8), ("lora.rank_pattern", {"q_proj": 8}),
    ("lora.dropout", 0), ("data.train", ["a", "b"]), ("data.validation", None), ("training.num_epochs", 2.5),
    ("training.activation_checkpointing", "every_12"), ("training.activation_checkpointing", "sublayer"),
    ("training.memory_limit", "24GiB"), ("training.memory_limit", "1.5 GB"), ("training.betas", [0.9, 0.95]),
    ("training.tokens_per_pass", 100), ("training.tokens_per_pass", None), ("training.tokens_per_pass", "auto"),
    ("training.device", "cuda:1"), ("training.max_grad_norm", None), ("training.learning_rate", 1),
    ("evaluation", None), ("tracking", None), ("tracking.wandb", "offline"), ("model.num_layers", 2),
]  # fmt: skip
REFUSED = [
    ("lora.rank", 8), ("optimiser", {}), ("training.lr", 1e-4), ("model.paths", "x"), ("lora", None), ("model", None),
    ("lora.r", 0), ("lora.r", 5000), ("lora.r", "8"), ("lora.r", True), ("lora.dropout", 1), ("lora.kind", "loha"),
    ("lora.target_modules", "q"), ("lora.target_modules", []), ("lora.target_modules", ["q_proj", "q_proj"]),
    ("lora.modules_to_save", ["q_proj"]), ("data.train", ""), ("data.train", []), ("data.train", None),
    ("training.activation_checkpointing", "every_1"), ("training.memory_limit", "24"), ("training.betas", [0.9]),
    ("training.betas", [0.9, 1.0]), ("training.device", "gpu"), ("training.learning_rate", 0), ("training.seed", -1),
    ("training.num_epochs", 0), ("training.compile", 1), ("training.tokens_per_pass", "all"), ("data.packing", "yes"),
    ("evaluation.at_start", None), ("tracking.wandb", "on"), ("model.variant", ""),
]  # fmt: skip


def test_the_file_is_what_the_spec_makes() -> None:
    """``python docs/make_run_spec.py`` writes it."""
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(make_schema())


def test_descriptions_are_plain_text_which_editors_and_explain_show() -> None:
    shown = [key.description for key in spec_keys()]
    assert [text for text in shown if "](" in text] == []
    pages = [name for text in shown for name in re.findall(r"docs/([\w-]+)\.md", text)]
    assert "learning-rate" in pages
    assert set(pages) <= set(documentation.pages())


def test_every_key_is_there_with_its_default_and_description() -> None:
    keys = {key.name: key for key in spec_keys()}
    fields = {
        f"{section}.{name}": inner
        for section, field in RunSpec.model_fields.items()
        for name, inner in _section_fields(field.annotation).items()
    }
    aliases = {f"{section}.{alias}" for section, alias in ALIASES}
    assert set(keys) == set(fields) | aliases
    for name, field in fields.items():
        assert keys[name].description == re.sub(r"\[.*?\]\((.*?)\)", r"docs/\1", field.description or "")
        assert keys[name].required == field.is_required()
        if not field.is_required():
            assert keys[name].default == json.loads(json.dumps(field.default))


def _section_fields(annotation: Any) -> dict[str, Any]:
    import typing

    kinds = [annotation, *typing.get_args(annotation)]
    found: dict[str, Any] = next(kind.model_fields for kind in kinds if hasattr(kind, "model_fields"))
    return found


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_the_table_of_what_is_accepted_is_the_specs(key: str, value: Any) -> None:
    build_spec(changed(key, value), "test")


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_the_table_of_what_is_refused_is_the_specs(key: str, value: Any) -> None:
    with pytest.raises(SpecError):
        build_spec(changed(key, value), "test")


def specs() -> Iterator[dict[str, Any]]:
    for path in (ROOT / "examples").glob("*.yaml"):
        yield read_yaml(path)
    resolved = build_spec(copy.deepcopy(SMALLEST), "test").model_dump(mode="json")
    yield resolved
    yield {key: value for key, value in SMALLEST.items() if key != "lora"}


def test_a_validator_accepts_and_refuses_what_the_spec_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(read_schema())
    validator = jsonschema.Draft7Validator(read_schema())
    for values in [*specs(), *(changed(*pair) for pair in ACCEPTED)]:
        assert [fault.message for fault in validator.iter_errors(values)] == [], values
    for key, value in REFUSED:
        assert not validator.is_valid(changed(key, value)), (key, value)
    both = changed("lora.lora_alpha", 8)
    both["lora"]["alpha"] = 8
    assert not validator.is_valid(both)


def test_the_examples_name_the_schema_that_is_there() -> None:
    for path in (ROOT / "examples").glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == EDITOR_LINE.format("../llamatune/run_spec.schema.json"), path
        assert (path.parent / first.partition("$schema=")[2]).resolve() == SCHEMA_FILE.resolve()


def test_a_specs_own_comment_changes_nothing_of_what_a_run_writes(tmp_path: Path) -> None:
    plain = json.dumps(SMALLEST)
    (tmp_path / "plain.yaml").write_text(plain)
    (tmp_path / "named.yaml").write_text(f"{EDITOR_LINE.format('schema.json')}\n{plain}")
    one, other = load_spec(tmp_path / "plain.yaml"), load_spec(tmp_path / "named.yaml")
    assert one.to_yaml() == other.to_yaml()
    assert "yaml-language-server" not in one.to_yaml()


def test_the_verb_prints_and_writes_it(command: Callable[..., Any], tmp_path: Path) -> None:
    shown = command("schema")
    assert (shown.code, shown.stdout, shown.stderr) == (0, schema_text(make_schema()), "")
    assert json.loads(command("schema", "--json").stdout) == read_schema()
    done = command("schema", "--output", tmp_path / "s.json")
    assert done.code == 0
    assert "# yaml-language-server: $schema=s.json" in done.stdout
    assert (tmp_path / "s.json").read_text() == schema_text(read_schema())
    written = json.loads(command("schema", "--output", tmp_path / "t.json", "--json").stdout)
    assert written["editor_line"] == EDITOR_LINE.format("t.json")

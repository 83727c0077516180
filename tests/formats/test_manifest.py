"""llamatune.json: written with a product, read with each fact's type checked."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamatune.errors import CheckpointError, DataError
from llamatune.formats.manifest import (
    MANIFEST,
    OtherVersion,
    build_directory,
    find_manifest,
    finished_product,
    manifest_if_readable,
    verify_product,
)
from llamatune.safe_reading import digest_file


def test_a_directory_appears_whole_with_its_manifest_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), build_directory(target, "thing", {"a": 1}) as staging:
        (staging.path / "part").write_bytes(b"x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with build_directory(target, "thing", {"a": 1}) as staging:
        (staging.path / "part").write_bytes(b"x")
        staging.facts["count"] = 3
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["kind"] == "thing"
    assert manifest["facts"] == {"count": 3}
    assert manifest["files"]["part"]["bytes"] == 1
    found = finished_product(target, "thing", {"a": 1})
    assert found is not None
    assert (found.kind, found.facts, found.bytes) == ("thing", {"count": 3}, 1)
    assert finished_product(target, "thing", {"a": 2}) is None
    (target / "part").write_bytes(b"xy")
    assert finished_product(target, "thing", {"a": 1}) is None


def make_product(path: Path, **facts: Any) -> Path:
    with build_directory(path, "thing", {}, overwrite=True) as staging:
        (staging.path / "part").write_bytes(b"x")
        staging.facts.update(facts)
    return path / MANIFEST


def test_facts_are_read_with_their_types(tmp_path: Path) -> None:
    facts = {"template": {"name": "alpaca"}, "base_fingerprint": "sha256:1", "tokenizer": {"fingerprint": "sha256:2"}}
    path = make_product(tmp_path / "out", **facts, max_position_embeddings=64, adapters=["a"])
    manifest = find_manifest(tmp_path / "out")
    assert (manifest.template, manifest.base_fingerprint) == (facts["template"], "sha256:1")
    assert (manifest.tokenizer_fingerprint, manifest.max_position_embeddings) == ("sha256:2", 64)
    assert manifest.merged_adapters == ["a"]
    assert manifest.digest == digest_file(path)
    make_product(tmp_path / "out")
    manifest = find_manifest(tmp_path / "out")
    assert (manifest.template, manifest.base_fingerprint, manifest.tokenizer_fingerprint) == (None, None, None)
    assert (manifest.max_position_embeddings, manifest.merged_adapters) == (None, [])


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"template": [1]}, "template"),
        ({"template": {"name": 5}}, "template"),
        ({"base_fingerprint": 5}, "base_fingerprint"),
        ({"adapters": ["a", 1]}, "adapters.1"),
        ({"max_position_embeddings": True}, "max_position_embeddings"),
        ({"max_position_embeddings": 1 << 53}, "max_position_embeddings"),
    ],
)
def test_a_malformed_fact_is_named_by_its_key(tmp_path: Path, facts: dict[str, Any], key: str) -> None:
    path = make_product(tmp_path / "out", **facts)
    with pytest.raises(CheckpointError, match=f"^{key}.*{path}"):
        find_manifest(tmp_path / "out")


def test_another_schema_is_told_from_a_broken_manifest(tmp_path: Path) -> None:
    path = make_product(tmp_path / "out", template={"name": "x"})
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "schema": 2, "files": ["another layout"]}))
    with pytest.raises(OtherVersion, match="schema 2"):
        verify_product(tmp_path / "out")
    found = find_manifest(tmp_path / "out")
    assert found is not None
    assert (found.template, found.files) == ({"name": "x"}, {})
    for broken in (
        {**raw, "files": {}},
        {**raw, "facts": 3},
        {**raw, "files": {"../x": {"bytes": 1, "sha256": "0" * 64}}},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError):
            find_manifest(tmp_path / "out", DataError)
        assert manifest_if_readable(tmp_path / "out") is None
    path.unlink()
    assert find_manifest(tmp_path / "out") is None
    with pytest.raises(CheckpointError, match="no such file"):
        verify_product(tmp_path / "out")

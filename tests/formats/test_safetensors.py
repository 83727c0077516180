"""safetensors files: what is written, the library reads; what does not fit its header is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import read_header, write_safetensors


def tensor_file(path: Path) -> Path:
    tensors = [("a", "F32", (2, 3)), ("b", "U8", (5,))]
    write_safetensors(Staging(path.parent), path.name, tensors, [bytes(24), bytes(5)], {"format": "pt"})
    return path


def test_what_the_tensor_writer_writes_the_library_reads(tmp_path: Path) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    loaded = safetensors_torch.load_file(tensor_file(tmp_path / "t.safetensors"))
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {"a": (2, 3), "b": (5,)}
    entries, metadata = read_header(tmp_path / "t.safetensors")
    assert entries["b"].end == (tmp_path / "t.safetensors").stat().st_size
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "change", [lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: raw[:20], lambda raw: b""]
)
def test_a_tensor_file_of_another_size_is_refused(tmp_path: Path, change: object) -> None:
    path = tensor_file(tmp_path / "t.safetensors")
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError):
        read_header(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t.safetensors"
    path.write_bytes(raw)
    try:
        read_header(path)
    except LlamatuneError as fault:
        assert "\n" not in str(fault)

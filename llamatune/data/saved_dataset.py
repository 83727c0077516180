"""A data set that Hugging Face's ``save_to_disk`` wrote: a directory of Arrow files, or of splits that are such."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TypeGuard

from llamatune.errors import DataError
from llamatune.strict_json import read_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_MOST_NAMED = 5


def is_saved_dataset(directory: Path) -> bool:
    """Whether a directory is a data set, or one of several splits."""
    return any((directory / name).is_file() for name in (_STATE, _SPLITS))


def data_files(directory: Path) -> list[Path]:
    """The Arrow files of a data set, in order; of several splits those of ``train``.

    Raises:
        DataError: no such data set, several splits without ``train``, or one whose rows were selected afterwards.
    """
    directory = directory / _split_of(directory)
    if not (directory / _STATE).is_file():
        named = sorted(path.name for path in directory.iterdir())[:_MOST_NAMED]
        todo = f"name the files in it ({', '.join(named)})" if named else "it is empty"
        raise DataError("a directory where a file, or a data set of save_to_disk, is expected", directory, todo)
    state = read_json(directory / _STATE, DataError)
    if state.get("_indices_data_files"):
        raise DataError("a selection of another data set's rows", directory, "save it again after flatten_indices()")
    entries = state.get("_data_files")
    listed = entries if isinstance(entries, list) else []
    found = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    names = [name for name in found if _is_plain(name)]
    if not names or len(names) != len(found):
        raise DataError("names no data files", directory / _STATE, "save the data set again")
    return [directory / name for name in names]


def split_note(directory: Path) -> str | None:
    """Which split is read, if there are others."""
    splits, read = _splits_in(directory), _split_of(directory)
    others = ", ".join(repr(name) for name in splits if name != read)
    return f"the rows are those of the split {read!r}; left out beside it: {others}" if others else None


def _split_of(directory: Path) -> str:
    """The name of the split that is read: ``train``, or the only one; empty if the directory is itself a data set."""
    splits = _splits_in(directory)
    if len(splits) > 1 and "train" not in splits:
        todo = f"name one: {directory / splits[0]}"
        raise DataError(f"a data set with the splits {', '.join(splits[:_MOST_NAMED])}", directory, todo)
    return "train" if "train" in splits else splits[0] if splits else ""


def _splits_in(directory: Path) -> list[str]:
    """The splits of a ``DatasetDict``; none if the directory is a data set, or neither."""
    path = directory / _SPLITS
    if (directory / _STATE).is_file() or not path.is_file():
        return []
    splits = read_json(path, DataError).get("splits")
    listed = splits if isinstance(splits, list) else []
    names = [name for name in listed if _is_plain(name)]
    if not names:
        raise DataError("names no splits", path, "save the data set again")
    return names


def _is_plain(name: object) -> TypeGuard[str]:
    """Whether a value names an entry of the directory itself."""
    return isinstance(name, str) and PurePosixPath(name).name == name not in ("", "..") and "\0" not in name

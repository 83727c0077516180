"""``benchmark.json``, the results of a benchmark: its reader. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from llamatune.errors import CheckpointError
from llamatune.formats.benchmark_cell import MeasuredCell, MeasuredGeneration, UnmeasuredCell
from llamatune.formats.file_schema import (
    LARGEST_FILE,
    LARGEST_NUMBER,
    FileSchema,
    Measure,
    Name,
    Positive,
    parse_values,
)
from llamatune.strict_json import read_json

BENCHMARK = "benchmark.json"
_NAME_ANOTHER = "name an --output directory of llamatune benchmark"


class AxisValues(FileSchema):
    """An axis of the grid: its key and its values."""

    key: Name
    values: Annotated[list[Name], Field(min_length=1)]


class EqualWork(FileSchema):
    """Rows and epochs that ``work_s`` is the time of."""

    rows: Positive
    epochs: Annotated[float, Field(gt=0, lt=LARGEST_NUMBER)]


class ComparedCell(MeasuredCell):
    """A measured cell, with its seconds for the work that is the same in each cell."""

    work: EqualWork | None = None
    work_s: Measure | None = None


class BenchmarkFile(FileSchema):
    """What is read of the file; its facts and the effects, which follow from the cells, are passed over."""

    model_config = ConfigDict(extra="ignore")

    axes: list[AxisValues]
    cells: list[dict[str, Any]]


@dataclass(frozen=True)
class StoredBenchmark:
    """Axes, and cells as ``benchmark_cell`` has them; ``of_generation``: of text, not of training steps."""

    axes: list[AxisValues]
    cells: list[dict[str, Any]]
    of_generation: bool


def read_benchmark(directory: Path) -> StoredBenchmark:
    """The benchmark of a directory.

    Raises:
        CheckpointError: no such file, not strict JSON, or a key or value that does not fit, which is named.
    """
    path = directory / BENCHMARK
    if not path.is_file():
        raise CheckpointError("no benchmark.json in it", directory, _NAME_ANOTHER)
    raw = read_json(path, max_bytes=LARGEST_FILE)
    file = parse_values(BenchmarkFile, raw, path, todo=_NAME_ANOTHER)
    of_generation = "repetitions" in raw
    measured = MeasuredGeneration if of_generation else ComparedCell
    keys = {axis.key: axis.values for axis in file.axes}
    cells = []
    for number, cell in enumerate(file.cells):
        schema = measured if cell.get("status") == "measured" else UnmeasuredCell
        where = f"{path}, cell {number + 1}"
        values = parse_values(schema, cell, where, todo=_NAME_ANOTHER).model_dump(exclude_unset=True)
        if values.get("work") is None or values.get("work_s") is None:
            values = {key: value for key, value in values.items() if key not in ("work", "work_s")}
        if values["values"].keys() != keys.keys() or any(x not in keys[key] for key, x in values["values"].items()):
            raise CheckpointError("a cell that is not of its axes", where, _NAME_ANOTHER)
        cells.append(values)
    if len({tuple(cell["values"].items()) for cell in cells}) != len(cells):
        raise CheckpointError("a cell comes twice", path, _NAME_ANOTHER)
    return StoredBenchmark(file.axes, cells, of_generation)

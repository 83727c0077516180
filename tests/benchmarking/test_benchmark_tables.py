"""The tables as text that other programs read, and as reports print them."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from llamatune.benchmarking.bar_chart import draw_chart
from llamatune.benchmarking.effects import effects
from llamatune.benchmarking.results import CATEGORIES, Work, results_csv
from llamatune.benchmarking.tables import effects_table, flat_table, nested_tables
from llamatune.formats.text_table import TextTable
from llamatune.spec_grid import Axis, parse_axis

AXES = [
    parse_axis(text)
    for text in ("lora=off,on", "training.precision=fp32,bf16", "batch=1x1,1x8", "lora.target_modules=[q_proj,v_proj]")
]


def measured(number: int) -> dict[str, Any]:
    categories = {name: (place + number) << 20 for place, name in enumerate(CATEGORIES)}
    return {
        "status": "measured",
        "allocated_bytes": sum(categories.values()),
        "predicted_bytes": round(1.04 * sum(categories.values())),
        "reserved_bytes": None,
        "device_bytes": None,
        "resident_bytes": 300 << 20,
        "categories": categories,
        "unattributed_bytes": 0,
        "step_s": 0.5 + number,
        "tokens_per_second": 100.0 * (number + 1),
        **Work(200, 5, 25_400).facts(100.0 * (number + 1)),
        "runtime_s": 10.0,
        "steps": 6,
        "warm_up_steps": 2,
        "skipped_windows": 0,
        "tokens": 600,
        "losses": [2.0, 3.0],
        "held_out_losses": [1.0, 2.0],
        "trainable_parameters": 7,
        "total_parameters": 70,
        "device": "cpu",
        "device_name": "cpu",
        "threads": 1,
        "torch": "2",
    }


def cells(axes: list[Axis], **others: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers that grow; ``others`` take the place of the numbers of cells by their place."""
    found = []
    for number, chosen in enumerate(itertools.product(*(axis.values for axis in axes))):
        settings = dict(zip((axis.key for axis in axes), chosen, strict=True))
        found.append({"values": settings, **others.get(f"cell{number}", measured(number))})
    return found


RESULTS = cells(
    AXES,
    cell0={"status": "oom", "reason": "out of memory | limit"},
    cell5={"status": "failed", "reason": "boom", "exit_code": 1},
    cell6={"status": "refused", "reason": "no such spec"},
    cell7={"status": "killed", "reason": "killed (SIGKILL)"},
)


def parsed(table: TextTable) -> list[list[str]]:
    """The lines of a Markdown table, its rule left out."""
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    rows = [[_shown(cell) for cell in line[1:-1].split("|")] for line in lines]
    assert set("".join(rows[1])) <= {"-", ":"}
    return [rows[0], *rows[2:]]


def _shown(cell: str) -> str:
    """What a reader of Markdown shows of a cell."""
    return html.unescape(re.sub(r"\\(.)", r"\1", cell)).strip()


def test_the_flat_table_has_a_line_for_each_cell_and_ratios_to_the_first_that_was_measured() -> None:
    table = flat_table(AXES, RESULTS)
    header, *lines = parsed(table)
    assert [len(line) for line in lines] == [len(header)] * 8
    assert header[:4] == ["lora", "precision", "batch", "target_modules"]
    assert "reserved" not in header, "a column that says nothing"
    by_name = [dict(zip(header, line, strict=True)) for line in lines]
    assert by_name[0]["peak"] == "OOM"
    assert by_name[0]["s/step"] == ""
    assert (by_name[1]["peak"], by_name[1]["ratio"], by_name[1]["speed"]) == ("21.0", "1.00x", "1.00x")
    assert (by_name[2]["peak"], by_name[2]["ratio"], by_name[2]["speed"]) == ("27.0", "1.29x", "1.50x")
    assert by_name[1]["held-out loss"] == "1.5000 ± 0.7071"
    assert by_name[1]["loss"] == "2.5000"
    assert [line["time"] for line in by_name[1:4]] == ["127.0", "84.7", "63.5"]
    assert any("that of equal work, 200 rows x 5 epochs" in note for note in table.notes)
    assert [line["peak"] for line in by_name[5:]] == ["failed", "refused", "killed"]
    assert any(note.startswith("failed (exit 1): boom [lora=on, precision=fp32, batch=1x8") for note in table.notes)
    assert any(note.startswith("refused: no such spec [") for note in table.notes)


def test_categories_that_miss_the_peak_are_owned_up_to() -> None:
    results = cells(AXES[:1])
    assert not any("add up" in note for note in flat_table(AXES[:1], results).notes)
    results[1]["allocated_bytes"] = round(results[1]["allocated_bytes"] * 1.04)
    assert any("add up to the peak within 3.8%" in note for note in flat_table(AXES[:1], results).notes)


def test_off_and_on_are_nested_in_lines_and_columns() -> None:
    axes = [*AXES[:3], parse_axis("training.activation_checkpointing=none,block")]
    results = cells(axes, cell3={"status": "oom", "reason": "out of memory"})
    table = nested_tables(axes, results)[3]
    assert table.title == "Tokens/s"
    assert [list(row) for row in (table.header, *table.rows)] == [
        ["", "batch", "OFF 1x1", "", "ON 1x8", ""],
        ["", "checkpointing", "OFF", "ON block", "OFF", "ON block"],
        ["lora", "precision", "", "", "", ""],
        ["OFF", "OFF", "100", "200", "300", "OOM"],
        ["", "ON bf16", "500", "600", "700", "800"],
        ["ON", "OFF", "900", "1,000", "1,100", "1,200"],
        ["", "ON bf16", "1,300", "1,400", "1,500", "1,600"],
    ]
    titles = [found.title for found in nested_tables(axes, results)]
    work = "Seconds for equal work, 200 rows x 5 epochs"
    assert titles == ["Peak memory, MiB", work, "Seconds a step", "Tokens/s", "Held-out loss"]
    seconds = nested_tables(axes, results)[1]
    assert seconds.rows[2] == ("OFF", "OFF", "254.0", "127.0", "84.7", "OOM"), "25,400 tokens at 100 to 300 a second"
    assert all(len({len(row) for row in parsed(found)}) == 1 for found in nested_tables(axes, results))


def test_one_axis_is_a_column_and_no_axis_one_number() -> None:
    only = nested_tables(AXES[:1], cells(AXES[:1]))[3]
    assert (only.header, only.rows) == (("lora", "Tokens/s"), (("OFF", "100"), ("ON", "200")))
    assert nested_tables([], cells([]))[3].rows == (("100",),)


def test_results_without_equal_work_have_no_such_table() -> None:
    """As those of a file that an earlier version wrote."""
    results = [{name: value for name, value in r.items() if not name.startswith("work")} for r in cells(AXES[:1])]
    assert [table.title for table in nested_tables(AXES[:1], results)][:2] == ["Peak memory, MiB", "Seconds a step"]
    assert "time" not in flat_table(AXES[:1], results).header


def test_the_csv_has_plain_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(AXES, RESULTS))))
    assert len(rows) == 8
    assert rows[0]["status"] == "oom"
    assert rows[0]["allocated_bytes"] == ""
    assert rows[0]["reason"] == "out of memory | limit"
    assert rows[1]["lora.target_modules"] == "[q_proj,v_proj]"
    assert int(rows[1]["allocated_bytes"]) == sum(int(rows[1][f"{name}_bytes"]) for name in CATEGORIES)
    assert float(rows[1]["held_out_loss_spread"]) == pytest.approx(0.5**0.5)
    assert rows[1]["reserved_bytes"] == ""


def test_the_effects_table_has_a_column_for_each_technique() -> None:
    table = effects_table(effects(AXES, cells(AXES)))
    header, *lines = parsed(table)
    assert header == ["", "lora on (not off)", "precision bf16 (not fp32)", "batch 1x8 (not 1x1)"]
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["pairs of cells"] == ["4", "4", "4"]
    # Peaks are 15, 21, ... 57: the fifth against the first, the sixth against the second, and so on.
    assert by_name["peak memory"][0] == "+102 (+73..+160)"
    assert by_name["impact on accuracy"][0] == "0"


def test_the_chart_is_a_picture_in_two_formats_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    pictures = draw_chart(AXES, RESULTS)
    assert pictures["png"].startswith(b"\x89PNG")
    texts = {element.text for element in ElementTree.fromstring(pictures["svg"]).iter() if element.text}
    assert " OOM" in texts
    assert "peak memory, MiB" in texts
    assert draw_chart(AXES, RESULTS) == pictures


def test_without_matplotlib_there_is_no_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        draw_chart(AXES, RESULTS)


@pytest.mark.parametrize("known", [True, False])
def test_cells_without_a_prediction_are_left_out_of_what_is_told_of_it(known: bool) -> None:
    unknown = {
        f"cell{number}": {**measured(number), "predicted_bytes": None} for number in range(1 if known else 0, 16)
    }
    notes = flat_table(AXES, cells(AXES, **unknown)).notes
    assert [note for note in notes if "at most 4.0% from the peak" in note] == [n for n in notes if "'planned'" in n]
    assert any("'planned'" in note for note in notes) == known

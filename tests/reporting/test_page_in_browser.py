"""The page as a browser shows it: wide, narrow and dark, nothing fetched, nothing complained of, nothing cut off."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import browser
import numpy
import pytest
from report_material import falling, noisy, write_run
from test_report import benchmark_cell, hostile_runs

from llamatune.command_options.training import ReportOptions
from llamatune.events import EvalDone
from llamatune.reporting.make_report import make_report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on the path")

KEYS = ("lora", "training.precision", "batch")
CHARTS = 8 + 1 + 2  # of the runs together, the map of layers, and each run's line in the legend

BOXES = """
[...document.querySelectorAll('svg')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const within = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const drawn = [...svg.querySelectorAll('path')].filter(path => path.getBBox().width + path.getBBox().height > 0);
  return {width: frame.width, height: frame.height, drawn: drawn.length, texts: within.length,
          outside: within.filter(box => box.left < frame.left - 1 || box.right > frame.right + 1 ||
                                        box.top < frame.top - 1 || box.bottom > frame.bottom + 1).length};
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one fp16 with a spike and over-fitting, one with gradient norms by layer."""
    folder = tmp_path_factory.mktemp("page")
    losses = noisy(falling(200), 0.05)
    losses[150] *= 8
    bowl = [EvalDone(20 * n, 1.2 + 0.05 * (n - 4) ** 2) for n in range(1, 11)]
    skipped = {9: [{"event": "skipped", "window": 10, "loss_scale": 256.0}]}
    norms = {
        step: [{"event": "layer_grad_norms", "step": step, "norms": {f"layers.{n}": 1 + n for n in range(32)}}]
        for step in range(1, 121)
    }
    one = write_run(folder / "over-fitted", losses, bowl, skipped, training__precision="fp16")
    two = write_run(folder / "by layer", noisy(falling(120), 0.1), extra=norms, training__learning_rate=3e-4)
    make_report(ReportOptions([one, two], folder / "report.html"))
    return folder / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def pixels(picture: bytes) -> numpy.ndarray:
    """(height, width, 3) from 0 to 255."""
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1200, 2400, "light"), (1200, 2400, "dark"), (400, 3200, "light")]
)
def test_the_page_is_shown_whole_and_quietly(
    width: int, height: int, scheme: str, page: Path, tab: browser.Page
) -> None:
    tab.open(page, width, height, scheme)
    assert tab.requests() == [page.as_uri()]
    assert tab.complaints() == []
    shown = pixels(tab.screenshot())
    assert shown.shape == (height, width, 3)
    ground, ink = (numpy.quantile(shown, share) for share in ((0.5, 0.001) if scheme == "light" else (0.5, 0.999)))
    assert (ground > 240 and ink < 80) if scheme == "light" else (ground < 40 and ink > 200)
    assert len(numpy.unique(shown[::4, ::4].reshape(-1, 3), axis=0)) > 100
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = tab.evaluate(BOXES)
    assert len(boxes) == CHARTS
    for box in boxes:
        assert box["width"] > 40
        assert box["height"] > 10
        assert box["drawn"] > 0
        assert box["outside"] == 0, box
    charts = [box for box in boxes if box["texts"]]
    assert len(charts) == CHARTS - 2
    assert all(box["width"] > (340 if width == 400 else 500) for box in charts)


def test_nothing_is_cut_on_paper_and_short_tables_stand_side_by_side(tmp_path: Path, tab: browser.Page) -> None:
    """A4 has 182 mm beside the margins, 688 pixels."""
    cells = [
        benchmark_cell(values[0], 600 << 20) | {"values": dict(zip(KEYS, values, strict=True))}
        for values in itertools.product(("off", "on"), ("fp32", "bf16"), ("1x1", "1x8"))
    ]
    axes = [{"key": key, "values": list(dict.fromkeys(cell["values"][key] for cell in cells))} for key in KEYS]
    (tmp_path / "benchmark.json").write_text(json.dumps({"axes": axes, "cells": cells, "steps": 20, "effects": []}))
    runs = [write_run(tmp_path / name, falling(40)) for name in ("one", "two")]
    make_report(ReportOptions(runs, tmp_path / "r.html", benchmark=[tmp_path]))
    tab.open(tmp_path / "r.html", 1200, 1000)
    tab.print_in(688)
    try:
        tables = (
            "[...document.querySelectorAll('table')].map(t => [t.caption?.innerText, t.getBoundingClientRect().right])"
        )
        assert [found for found in tab.evaluate(tables) if found[1] > 690] == []
        assert tab.evaluate("document.querySelectorAll('table').length") > 10
        lefts = (
            "[...document.querySelectorAll('section > .short')].map(t => Math.round(t.getBoundingClientRect().left))"
        )
        assert len(set(tab.evaluate(lefts))) > 1
    finally:
        tab.print_normally()


def test_colours_follow_the_scheme(page: Path, tab: browser.Page) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        tab.open(page, 1200, 800, scheme)
        colours[scheme] = tab.evaluate(
            "[...document.querySelectorAll('figure svg path')].map(path => getComputedStyle(path).stroke)"
        )
    changed = [a for a, b in zip(colours["light"], colours["dark"], strict=True) if a != b]
    assert "rgb(5, 78, 161)" in changed
    assert not {"rgb(5, 78, 161)", "rgb(255, 54, 47)"} & set(colours["dark"])


def test_markup_from_files_neither_runs_nor_loads(tmp_path: Path, tab: browser.Page) -> None:
    runs = hostile_runs(tmp_path)
    make_report(ReportOptions(runs, tmp_path / "report.html", generations=tmp_path / "generations.jsonl"))
    tab.open(tmp_path / "report.html", 900, 1200)
    assert tab.requests() == [(tmp_path / "report.html").as_uri()]
    assert tab.complaints() == []
    assert tab.evaluate("document.scripts.length + document.images.length") == 0
    assert "<script>alert(1)</script>" in tab.evaluate("document.body.innerText")

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


NAMES = (
    "r=8,learning_rate=1e-4,lora.target_modules=[q_proj,k_proj,v_proj,o_proj],training.gradient_accumulation_steps=16",
    "r=8,learning_rate=2e-3,target_modules=all-linear,seed=3",
    "a_run_name_whose_author_likes_underscores_very_much_and_has_a_long_list_of_them",
    "\u0627\u0644\u0646\u0645\u0648\u0630\u062c_\u0627\u0644\u0639\u0631\u0628\u064a_\u0645\u0639_\u0645\u0639\u062f\u0644_\u062a\u0639\u0644\u0645_\u0635\u063a\u064a\u0631",
    "withoutanyplaceatwhichitcouldbebroken" * 2,
    "baseline",
)
TOO_WIDE = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
LINES = """
[...document.querySelectorAll('thead th')].filter(th => th.innerText.trim() == %s).map(th => {
  const range = document.createRange(); range.selectNodeContents(th);
  return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size;
})
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs with long names, the first with a spike: a table of numbers and sentences."""
    folder = tmp_path_factory.mktemp("many")
    losses = noisy(falling(120), 0.05)
    losses[90] *= 8
    runs = [write_run(folder / name, losses, training__learning_rate=1e-4 * n) for n, name in enumerate(NAMES, 1)]
    make_report(ReportOptions(runs, folder / "report.html"))
    return folder / "report.html"


def test_tables_of_many_runs_with_long_names_fit_a_screen(many: Path, tab: browser.Page) -> None:
    tab.open(many, 1280, 1000)
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.evaluate("document.querySelector('h1').innerText") == "Training report: 6 runs"
    assert max(tab.evaluate(LINES % json.dumps("baseline"))) == 1, "a short word is not broken"


def test_a_table_that_goes_on_has_a_shade_at_that_edge(many: Path, tab: browser.Page) -> None:
    """The pixels of its right edge are darker than the page until it is scrolled to its end."""
    tab.open(many, 400, 1000)
    place = "document.querySelectorAll('.scroll')[1]"
    assert tab.evaluate(f"{place}.scrollWidth > {place}.clientWidth + 40")
    tab.evaluate(f"{place}.scrollIntoView()")
    box = tab.evaluate(f"(({place}).getBoundingClientRect().toJSON())")
    edge = slice(int(box["right"]) - 3, int(box["right"]) - 1)

    def shade() -> float:
        return float(numpy.median(pixels(tab.screenshot())[int(box["top"]) + 2 : int(box["bottom"]) - 2, edge]))

    before = shade()
    tab.evaluate(f"{place}.scrollLeft = 10000")
    assert before < 235
    assert shade() > 250


def test_answers_of_any_script_and_length_are_readable(tmp_path: Path, tab: browser.Page) -> None:
    """A sentence that is written from the right begins there; a prompt of one long line does not scroll sideways."""
    arabic = "\u0645\u0627 \u0647\u0648 \u0644\u0648\u0646 \u0627\u0644\u0633\u0642\u0641."
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    long = "Read this notice of the council carefully. " * 120
    answered = [
        {"event": "answer", "step": step, "number": number, "prompt": prompt, "reference": None, "answer": answer,
         "tokens": 3, "finish_reason": "eos"}
        for number, (prompt, answer) in enumerate([(arabic, arabic), (long, persian), ("short", long)], 1)
        for step in (0, 3)
    ]  # fmt: skip
    run = write_run(tmp_path / "run", falling(3), extra={3: answered})
    lines = [{"prompt": f"### Instruction:\n{long}\n", "completion": arabic, "base_completion": "no"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_report(ReportOptions([run], tmp_path / "r.html", generations=tmp_path / "answers.jsonl"))
    tab.open(tmp_path / "r.html", 900, 1000)
    texts = "[...document.querySelectorAll('.instruction, .answers td, .timeline td')]"
    assert "\u0645\u06cc\u200c\u062e" in tab.evaluate("document.body.innerText"), "its joiner is part of the word"
    directions = tab.evaluate(f"{texts}.map(e => [e.innerText, getComputedStyle(e).direction])")
    assert {direction for text, direction in directions if text == arabic} == {"rtl"}
    assert {direction for text, direction in directions if text.isascii()} == {"ltr"}
    assert sum(text == arabic for text, _ in directions) == 4
    prompts = f"{texts}.filter(e => e.innerText.length > 1000 && e.className.includes('instruction'))"
    assert set(tab.evaluate(f"{prompts}.map(e => e.clientHeight < 300 && e.scrollHeight > e.clientHeight)")) == {True}
    assert tab.evaluate("document.documentElement.scrollWidth") <= 900
    tab.print_in(688)
    try:
        assert set(tab.evaluate(f"{prompts}.map(e => e.scrollHeight > e.clientHeight)")) == {False}
        kept = "[...document.querySelectorAll('.answer')].map(e => getComputedStyle(e).breakInside)"
        assert tab.evaluate(kept) == ["auto", "avoid", "auto", "auto"], "what is longer than a sheet may be divided"
    finally:
        tab.print_normally()

"""Charts and their images: thinning, colours against models of colour blindness, valid SVG, equal bytes."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from report_material import falling, noisy, write_run

from llamatune.events import EvalDone
from llamatune.reporting.averages import epoch_means, running_average
from llamatune.reporting.chart_images import PALETTE, Chart, chart_files, chart_svg, charts_png
from llamatune.reporting.charts import level_values, make_charts, run_legend, whole_legend
from llamatune.reporting.curves import Curve, short_name, short_names, thinned
from llamatune.reporting.run_reader import read_run

SVG = "{http://www.w3.org/2000/svg}"


def test_thinning_keeps_every_extreme_and_the_order() -> None:
    values = noisy([1.0] * 10_000, 0.2)
    values[1234], values[8765] = 50.0, 0.001
    kept = thinned(values, 200)
    assert kept == sorted(set(kept))
    assert len(kept) <= 200
    assert {1234, 8765} <= set(kept)
    assert thinned(values[:150], 200) == list(range(150))
    assert thinned([], 200) == []


def _rgb(colour: str) -> numpy.ndarray:
    channels = numpy.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return numpy.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    light, dark = sorted(
        (float(_rgb(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (one, other)), reverse=True
    )
    return light / dark


def _lab(linear: numpy.ndarray) -> numpy.ndarray:
    xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = numpy.cbrt(xyz / [0.9505, 1.0, 1.089])
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Severity 1 of Machado, Oliveira and Fernandes (2009), on linear RGB.
MISSING_CONES = {
    "none": numpy.eye(3),
    "long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("missing", MISSING_CONES)
def test_series_are_told_apart_without_any_one_kind_of_cone(missing: str, scheme: int) -> None:
    matrix = numpy.array(MISSING_CONES[missing])
    seen = {
        name: _lab(numpy.clip(matrix @ _rgb(colours[scheme]), 0, 1))
        for name, colours in PALETTE.items() if name.startswith("series")
    }  # fmt: skip
    distances = {(a, b): float(numpy.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(seen, 2)}
    nearest = min(distances, key=distances.__getitem__)
    assert distances[nearest] > 15, nearest  # a difference of 2.3 is just noticed
    assert min(d for pair, d in distances.items() if set(pair) <= {"series-1", "series-2", "series-3"}) > 25


@pytest.mark.parametrize(("scheme", "page"), [(0, "#ffffff"), (1, "#0d1117")])
def test_lines_and_text_stand_out_from_the_page(scheme: int, page: str) -> None:
    for name, colours in PALETTE.items():
        if name != "faint":
            assert _contrast(colours[scheme], page) > (7 if name == "ink" else 3), name


def _curves(tmp_path: Path) -> list[Curve]:
    norms = {
        step: [{"event": "layer_grad_norms", "step": step, "norms": {f"layers.{n}": n * step for n in range(3)}}]
        for step in range(1, 41)
    }
    skipped = {7: [{"event": "skipped", "window": 8, "loss_scale": 512.0}]}
    paths = {
        "plain": write_run(tmp_path / "plain", noisy(falling(40), 0.1), [EvalDone(20, 2.0), EvalDone(40, 1.5)]),
        "no <b>$steps$</b>": write_run(tmp_path / "none", []),
        "one step": write_run(tmp_path / "one", [2.0], training__max_grad_norm=None),
        "_layers": write_run(tmp_path / "layers", falling(40), extra=norms),
        "half": write_run(tmp_path / "half", [1e98, *falling(39)], extra=skipped, training__precision="fp16"),
        "nothing lost": write_run(tmp_path / "zero", [0.0] * 5),
        "the seventh": write_run(tmp_path / "seventh", falling(1500)),
    }
    curves = []
    for place, (name, path) in enumerate(paths.items()):
        run = read_run(path, name)
        losses = [step.loss for step in run.metrics.steps]
        validation = {found.step: found.loss for found in run.metrics.evaluations}
        curves.append(Curve(run, place, running_average(losses, 0.9), epoch_means(run.metrics.steps, validation), []))
    return curves


def test_every_chart_is_valid_svg_without_addresses_scripts_or_colours_of_its_own(tmp_path: Path) -> None:
    charts = make_charts(_curves(tmp_path))
    assert [chart.name for chart in charts] == [
        "loss", "perplexity", "epochs", "learning-rate", "gradient-norm", "throughput", "memory", "loss-scale",
        "layers-3",
    ]  # fmt: skip
    ids: list[str] = []
    for chart in charts:
        svg = chart_svg(chart)
        root = ElementTree.fromstring(svg)
        assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
        named = {element.get("id"): element for element in root.iter() if element.get("id")}
        labels = [named[name] for name in (root.get("aria-labelledby") or "").split()]
        assert [label.tag for label in labels] == [f"{SVG}title", f"{SVG}desc"]
        assert labels[0].text == chart.title
        assert labels[1].text == chart.description != ""
        assert not {element.tag for element in root.iter()} & {f"{SVG}script", f"{SVG}foreignObject", f"{SVG}style"}
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on")
                if name.endswith("href"):
                    assert value.startswith("data:image/png;base64,") or value[1:] in named
        for light, _ in PALETTE.values():
            assert light not in svg
        ids += named
    assert len(ids) == len(set(ids))


def test_the_same_curves_give_the_same_bytes(tmp_path: Path) -> None:
    curves = _curves(tmp_path)

    def images() -> object:
        charts = make_charts(curves)
        return [chart_svg(chart) for chart in charts], charts_png(charts, whole_legend(curves)), chart_files(charts[0])

    assert images() == images()


def test_the_picture_holds_every_chart_and_every_name(tmp_path: Path) -> None:
    from PIL import Image

    curves = _curves(tmp_path)
    charts = make_charts(curves)
    picture = Image.open(io.BytesIO(charts_png(charts, whole_legend(curves))))
    assert picture.size[0] == 1500
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    for curve in curves:
        assert tuple(int(curve.style["color"][i : i + 2], 16) for i in (1, 3, 5)) in colours


def _texts(svg: bytes) -> list[str]:
    return ["".join(found.itertext()).strip() for found in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_chart_of_its_own_has_title_and_legend_in_each_kind_of_file(tmp_path: Path) -> None:
    from PIL import Image

    curves = _curves(tmp_path)
    (alone,) = (chart for chart in make_charts(curves[:1]) if chart.name == "loss")
    files = chart_files(alone)
    assert Image.open(io.BytesIO(files["png"])).size[0] == 1000
    assert files["pdf"].startswith(b"%PDF-")
    assert {"Loss", "training, each update", "training, moving average", "validation"} <= set(_texts(files["svg"]))
    (several,) = (chart for chart in make_charts(curves) if chart.name == "loss")
    texts = _texts(chart_files(several)["svg"])
    assert {curve.run.name for curve in curves} <= set(texts)
    assert texts.count("validation") == 1


def _named(charts: list[Chart]) -> set[str]:
    return {chart.name for chart in charts}


def test_a_chart_that_would_be_a_level_line_is_told_in_words(tmp_path: Path) -> None:
    losses = noisy(falling(40), 0.1)
    level = read_run(write_run(tmp_path / "level", losses), "level")
    for number, step in enumerate(level.metrics.steps):
        values = {**vars(step), "learning_rate": 1e-5, "peak_memory_bytes": (3 << 28) + (number << 20)}
        level.metrics.steps[number] = type(step)(**values)
    curve = Curve(level, 0, running_average(losses, 0.9), epoch_means(level.metrics.steps, {}), [])
    assert _named(make_charts([curve])) == {"loss", "perplexity", "epochs", "gradient-norm", "throughput"}
    assert level_values([curve]) == {"Learning rate": "1e-05", "Peak memory so far": "807.0 MiB"}
    other = read_run(write_run(tmp_path / "other", [2.0]), "other")
    changing = Curve(other, 1, [2.0], [], [])
    assert level_values([curve, changing])["Peak memory so far"] == "level: 807.0 MiB, other: 1.50 GiB"
    assert {"learning-rate", "memory"} <= _named(make_charts([curve, _curves(tmp_path)[0]]))


def test_a_run_without_a_step_has_no_empty_chart(tmp_path: Path) -> None:
    empty = _curves(tmp_path)[1]
    assert make_charts([empty]) == []
    assert level_values([empty]) == {}
    before = read_run(write_run(tmp_path / "b", [], tail='{"event": "eval", "step": 0, "loss": 2.5}\n'), "before")
    assert _named(make_charts([Curve(before, 0, [], [], [])])) == {"loss", "perplexity"}


def test_dots_of_updates_are_seen(tmp_path: Path) -> None:
    """In the picture of 69 updates they cover more than a line would."""
    from PIL import Image

    run = read_run(write_run(tmp_path / "dots", noisy(falling(69), 0.2)), "dots")
    losses = [step.loss for step in run.metrics.steps]
    curve = Curve(run, 0, losses, epoch_means(run.metrics.steps, {}), [])
    (chart,) = (chart for chart in make_charts([curve]) if chart.name == "epochs")
    shown = numpy.asarray(Image.open(io.BytesIO(chart_files(chart)["png"])).convert("RGB")).astype(int)
    blue = (shown[..., 2] - shown[..., 0] > 40).sum()
    assert blue > 69 * 100  # a disc of 6.5 points has 256 pixels at 200 dots an inch; some lie upon each other


def _level_curve(path: Path, losses: list[float], seconds: float = 0.5) -> Curve:
    """A curve of no epochs whose updates take ``seconds`` each."""
    run = read_run(write_run(path, losses), path.name)
    for number, step in enumerate(run.metrics.steps):
        run.metrics.steps[number] = replace(step, elapsed_s=seconds * step.step)
    return Curve(run, 0, losses, [], [])


def test_names_that_differ_at_their_ends_stay_apart_in_a_legend(tmp_path: Path) -> None:
    names = [f"learning_rate=2e-3,target_modules=all-linear,dropout=0.05,seed={seed}" for seed in range(3)]
    shown = [name for name, _ in run_legend([_level_curve(tmp_path / name, falling(3)) for name in names])]
    assert len(set(shown)) == 3
    for name, full in zip(shown, names, strict=True):
        start, end = name.split("...")
        assert full.startswith(start)
        assert full.endswith(end)
        assert 40 < len(name) <= 48


@pytest.mark.parametrize(("seconds", "unit"), [(0.5, "seconds"), (30.0, "minutes"), (1800.0, "hours")])
def test_time_is_counted_in_the_unit_of_the_length_of_the_run(seconds: float, unit: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    curve = _level_curve(tmp_path / "run", falling(40), seconds)
    (chart,) = [chart for chart in make_charts([curve]) if chart.name == "throughput"]
    axes = Figure().add_subplot()
    chart.draw(axes)
    assert axes.get_xlabel() == unit
    assert max(axes.lines[0].get_xdata()) == 20  # of each unit


def test_large_numbers_on_an_axis_are_written_as_in_the_tables(tmp_path: Path) -> None:
    (chart,) = [
        chart
        for chart in make_charts([_level_curve(tmp_path / "run", [11.0, 9.0, 4.0, 1.0])])
        if chart.name == "perplexity"
    ]
    assert {"10", "100", "1,000", "10,000"} <= set(_texts(chart_files(chart)["svg"]))


def test_long_names_that_differ_in_their_middles_alone_are_numbered() -> None:
    names = [f"lora.r=8,training.learning_rate={rate}e-3,lora.dropout=0.05,training.seed=1" for rate in (1, 2)]
    assert short_name(names[0]) == short_name(names[1])
    shown = short_names(names)
    assert len(set(shown)) == 2
    assert [name[:11] for name in shown] == ["1: lora.r=8", "2: lora.r=8"]
    assert max(map(len, shown)) <= 48
    assert short_names(["a", "b", "a"]) == ["a", "b", "a"]

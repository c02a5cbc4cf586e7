"""Charts: what they draw, in words and in figures, and that nothing in them refers to anything or keeps a colour of its own."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FOREIGN_ATTRIBUTES, FOREIGN_TAGS, Page

from xmc_ray.metrics.calibration import SCORE_BINS, Reliability
from xmc_ray.reports.charts import Chart, curves, histogram, reliability, thinned

SCORES = [10_000] * (SCORE_BINS - 1) + [810_000]


def drawn() -> dict[str, Chart]:
    sums = Reliability()
    sums.update(np.array([[0.95, 0.9, 0.12]]), np.array([[0, 1, 2]]), np.array([[True, False, False]]))
    charts = {
        "curves": curves({"loss": [(1, 3.0), (2000, 1.5), (4000, 1.0)], "nothing": []}, "loss"),
        "reliability": reliability({"raw": sums, "nothing": Reliability()}),
        "histogram": histogram(SCORES, [20_000] * SCORE_BINS),
    }
    return {name: chart for name, chart in charts.items() if chart}


def test_a_chart_says_what_it_shows() -> None:
    charts = drawn()
    spoken = {name: Page(chart.drawing).having("svg")[0]["aria-label"] for name, chart in charts.items()}
    assert spoken == {
        "curves": "loss from 3 to 1, over steps 1 to 4,000",
        "reliability": "Share of right tags by score; expected calibration error raw 0.3567; the table below has all figures",
        "histogram": "Histogram of 1,000,000 tags by score, most of them in 0.95 – 1.00; the table below has all figures",
    }
    assert [chart.keys for chart in charts.values()] == [
        [("loss", "first")],
        [("raw", "first")],
        [("This night", "now"), ("The night before", "before")],
    ]
    assert charts["curves"].rows == [["1", "3"], ["2,000", "1.5"], ["4,000", "1"]]
    assert charts["reliability"].rows == [
        ["raw, 0.07 – 0.13", "1", "0.120", "0%"],
        ["raw, 0.87 – 0.93", "1", "0.900", "0%"],
        ["raw, 0.93 – 1.00", "1", "0.950", "100%"],
    ]
    assert charts["histogram"].rows[-1] == ("0.95 – 1.00", "810,000", "81.0%", "5.00%")
    assert len(charts["histogram"].rows) == SCORE_BINS


def test_axes_have_ticks_and_units() -> None:
    texts = {name: set(Page(chart.drawing).texts) for name, chart in drawn().items()}
    assert {"step", "loss", "0", "2,000", "4,000", "1.5"} <= texts["curves"]
    assert {"mean score", "share of tags that are right", "0.0", "0.4", "1.0"} <= texts["reliability"]
    assert {"score", "share of all tags", "0%", "80%", "0.5"} <= texts["histogram"]


def test_bars_and_lines_are_where_their_values_are() -> None:
    page = Page(drawn()["histogram"].drawing.split("\n")[0])
    tops = [min(map(float, re.findall(r"[\d.]+ ([\d.]+)", bar["d"] or ""))) for bar in page.having("path", **{"class": "now"})]
    floor = float(re.findall(r"[\d.]+ ([\d.]+)", page.having("path", **{"class": "axis"})[0]["d"] or "")[0])
    heights = [floor - top for top in tops]
    assert len(heights) == SCORE_BINS and heights[0] == pytest.approx(heights[-1] / 81, abs=0.2)
    line = page.having("path", **{"class": "before"})[0]["d"] or ""
    assert floor - min(map(float, re.findall(r"[\d.]+ ([\d.]+)", line))) == pytest.approx(heights[-1] * 5 / 81, abs=0.2)


def test_a_bin_with_few_tags_does_not_look_empty() -> None:
    chart = histogram([0, 1, *[10**6] * (SCORE_BINS - 2)], None)
    assert chart is not None and chart.columns == ["Score", "Tags", "Share"]
    empty, few = (bar["d"] or "" for bar in Page(chart.drawing).having("path", **{"class": "now"})[:2])
    heights = [np.ptp([float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", bar)]) for bar in (empty, few)]
    assert heights[0] == 0 and heights[1] >= 1


def test_nothing_refers_to_anything_and_the_page_gives_the_colours() -> None:
    for name, chart in drawn().items():
        page = Page(chart.drawing)
        assert {tag for tag, _ in page.tags} == {"svg", "path", "text"}, name
        assert not FOREIGN_TAGS & {tag for tag, _ in page.tags}
        attributes = {attribute for _, given in page.tags for attribute in given}
        assert not (FOREIGN_ATTRIBUTES | {"id", "clip-path", "fill", "stroke"}) & attributes
        assert not re.search("#|url|://|matplotlib", chart.drawing)


def test_a_chart_is_drawn_for_broad_and_for_narrow_screens_and_always_the_same() -> None:
    classes = {name: [svg["class"] for svg in Page(chart.drawing).having("svg")] for name, chart in drawn().items()}
    both = ["chart broad", "chart narrow"]
    assert classes == {"curves": both, "reliability": ["chart square"], "histogram": both}
    assert drawn() == drawn()


def test_neither_obeys_nor_changes_the_settings_of_matplotlib() -> None:
    import matplotlib

    expected = drawn()
    others = {"axes.xmargin": 0.4, "font.size": 30.0, "svg.fonttype": "path", "text.color": "red"}
    with matplotlib.rc_context(others):
        assert drawn() == expected
        assert {name: matplotlib.rcParams[name] for name in others} == others


def test_importing_the_reports_imports_neither_matplotlib_nor_torch() -> None:
    code = "import sys, xmc_ray.reports.tagging, xmc_ray.reports.training as _; print({'matplotlib', 'torch'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out == "set()\n"


def test_no_chart_of_nothing() -> None:
    assert curves({"loss": []}, "loss") is None and reliability({"raw": Reliability()}) is None
    assert histogram([0] * SCORE_BINS, SCORES) is None
    alone = histogram(SCORES, [0] * SCORE_BINS)
    assert alone is not None and len(alone.keys) == 1


def test_a_single_point_is_a_dot() -> None:
    chart = curves({"loss": [(7, 2.5)]}, "loss")
    assert chart is not None
    dots = [path["d"] or "" for path in Page(chart.drawing).having("path", **{"class": "first"})]
    assert [np.ptp([float(x) for x in re.findall(r"([\d.]+) [\d.]+", dot)]) for dot in dots] == [0, 0]
    assert all(dot.count("L") == 1 for dot in dots)


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(2, 50))
def test_a_thinned_curve_keeps_its_ends(n: int, most: int) -> None:
    points = [(step, 0.0) for step in range(n)]
    kept = thinned(points, most)
    assert len(kept) == min(n, most) == len(set(kept)) and kept[0] == points[0] and kept[-1] == points[-1]


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e30, 1e30)), min_size=1, max_size=5, unique_by=lambda point: point[0])
)
def test_any_points_can_be_drawn(points: list[tuple[int, float]]) -> None:
    chart = curves({"loss": sorted(points)}, "loss")
    assert chart is not None and "nan" not in chart.drawing and Page(chart.drawing).having("path", **{"class": "first"})

"""Figures of nights over time."""

from pathlib import Path

from made_nights import write_night

from xmc_ray.show.night import read_night
from xmc_ray.show.trends import over_days, points, trends


def test_each_figure_of_finished_nights(tmp_path: Path) -> None:
    documents = [("a", "", {"x": 0.5}), ("b", "", {})]
    folders = [write_night(tmp_path / day / "out", day, documents, rejected=1) for day in ("2026-11-23", "2026-11-24")]
    (folders[1] / "_SUCCESS").unlink()
    found = {trend.title: trend.chart for trend in trends([*map(read_night, map(str, folders))], {"2026-11-23": 0.75})}
    assert [title for title, chart in found.items() if chart is None] == []
    failed, live = found["Rejected, or without a tag"], found["Live precision"]
    assert (
        failed is not None
        and failed.rows == [["23 Nov", "0.5", "0.5"]]
        and failed.columns == ["Day", "rejected", "without a tag"]
    )
    assert live is not None and live.rows == [["23 Nov", "0.75"]]


def test_nothing_is_drawn_of_nothing_and_the_same_only_once() -> None:
    assert over_days({"none": []}, "share") is None
    one = {"some": points([("2026-11-01", 1.0), ("2026-11-02", None)])}
    assert over_days(one, "share") is over_days(dict(one), "share")

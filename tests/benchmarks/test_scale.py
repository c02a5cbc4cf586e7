"""What `make bench NAME=scale` says of costs, on rows made up."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality._tables import TOTAL
from benchmarks.quality.scale import Scale, draw, finished, front, methods, pareto


def row(seconds: float, *figures: float) -> dict[str, Any]:
    return {"total": dict(zip(("P@1", "P@5", "PSP@5"), figures, strict=True)), "costs": {"cpu_seconds": seconds}}


RUNS = {
    "worse-and-dearer": row(30, 0.5, 0.3, 0.3),
    "xmc_ray-one": row(20, 0.6, 0.4, 0.3),
    "tail": row(40, 0.5, 0.3, 0.4),
    "cheapest": row(10, 0.1, 0.1, 0.1),
    "same-and-dearer": row(50, 0.6, 0.4, 0.3),
    "xmc_ray-ensemble-x2": row(90, 0.9, 0.9, 0.9),
    "slow": {"failure": "stopped after 9 minutes"},
}


def test_what_is_dearer_and_no_better_is_not_in_front() -> None:
    assert list(finished(RUNS)) == ["cheapest", "xmc_ray-one", "worse-and-dearer", "tail", "same-and-dearer"]
    assert front(RUNS) == ["cheapest", "xmc_ray-one", "tail"]
    assert front({}) == []


def test_the_table_has_a_row_a_method_and_the_picture_is_drawn(tmp_path: Path) -> None:
    page = pareto({"set": RUNS})
    assert "| **xmc_ray-one** | 20 | 60.00 | 40.00 | 30.00 | * |" in page
    assert "| worse-and-dearer | 30 | 50.00 | 30.00 | 30.00 |  |" in page and "slow" not in page
    draw({"set": RUNS, "peers": {"cheapest": RUNS["cheapest"]}}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("</svg>") == 1


@pytest.mark.parametrize(
    ("seconds", "left_out", "told"),
    [(20, "", "holds"), (21, "", "falls short"), (20, "omikuji-bonsai", "falls short"), (20, "omikuji-parabel", "falls short")],
)
def test_it_holds_if_no_run_is_missing_and_ours_costs_at_most_twice(
    seconds: float, left_out: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [one.name for one in methods("git-paths", []) if one.name != left_out]
    runs = {name: {"total": dict.fromkeys(TOTAL, 0.1), "costs": {"cpu_seconds": 10.0, "train_seconds": 1}} for name in names}
    runs["xmc_ray-rule"] = {"total": dict.fromkeys(TOTAL, 0.2), "costs": {"cpu_seconds": seconds, "train_seconds": 1}}
    Scale(name="scale", given=argparse.Namespace(), minutes=1.0).judge({"git-paths": runs}, {})
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(told) and (left_out in printed)


def test_every_method_has_its_script() -> None:
    many = methods("git-paths", [])
    assert [one.name for one in many][:2] == ["xmc_ray-rule", "omikuji-tree"] and many[:1] == methods("tate", [])
    assert all(one.script.exists() for one in many)

"""The page and the lines of live precision: complete, well-formed, safe from whatever labels there are."""

import pyarrow as pa
import pytest
from pages import FOREIGN_TAGS, NASTY, Page

from xmc_ray.data.feedback import Feedback
from xmc_ray.metrics.live import LivePrecision
from xmc_ray.reports.live import lines, live_report


def live_of(label: str) -> LivePrecision:
    rows = [{"id": f"d{n}", "label": label, "verdict": "accepted" if n < 15 else "rejected"} for n in range(20)]
    live = LivePrecision(Feedback.of(pa.Table.from_pylist([*rows, {"id": "d0", "label": "missed", "verdict": "accepted"}])))
    live.update(pa.table({"id": [f"d{n}" for n in range(20)], "labels": [[label]] * 20, "scores": [[0.85]] * 20}))
    live.end_night("2026-11-23")
    live.end_night("2026-11-22")
    return live


def test_every_figure_is_shown() -> None:
    live = live_of("plum")
    tally = live.tally(pa.array(["plum", "missed"]))
    page = Page(live_report("out", live, tally, calibrated=True))
    said = " ".join(page.texts)
    for part in ("75.0%", "53.1% to 88.8%", "2 nights, 2026-11-22 to 2026-11-23", "0.8 to 0.9: 85.0% promised by the scores"):
        assert part in said, part
    assert "plum" in page.texts and "dt=2026-11-23" in page.texts and "accepted labels that were not among the tags" in said
    assert [*lines(live, tally, calibrated=False)] == [
        "feedback: 16 accepted and 5 rejected labels of documents",
        "precision of judged tags: 75.0% of 20 (53.1% to 88.8%); 1 accepted labels were not tagged",
        "dt=2026-11-23  75.0% of 20 (53.1% to 88.8%)",
        "dt=2026-11-22  none judged",
        "scores 0.8 to 0.9  75.0% of 20 (53.1% to 88.8%)  85.0% mean score, not calibrated",
        "label plum  75.0% of 20 (53.1% to 88.8%)",
    ]


@pytest.mark.parametrize("kind", ["script", "closing tag", "quotes", "entity", "emoji"])
def test_labels_cannot_break_the_page(kind: str) -> None:
    label = NASTY[kind]
    live = live_of(label)
    page = Page(live_report(label, live, live.tally(pa.array([label, "missed"])), calibrated=True))
    assert page.texts.count(label) >= 2 and not any(page.having(tag) for tag in FOREIGN_TAGS)


def test_labels_cannot_command_the_terminal_or_pass_for_lines() -> None:
    label = "\x1b[31mred\ndt=2026-11-23  100.0%"
    live = live_of(label)
    *_, last = lines(live, live.tally(pa.array([label, "missed"])), calibrated=True)
    assert last.startswith("label \N{REPLACEMENT CHARACTER}[31mred dt=2026-11-23  100.0%  75.0% of 20") and last.isprintable()

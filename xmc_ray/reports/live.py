"""Live precision as lines for a console, and as one self-contained HTML page."""

from collections.abc import Iterator

from xmc_ray.data.feedback import Tally
from xmc_ray.errors import one_line
from xmc_ray.metrics.live import ENOUGH, LivePrecision, Share
from xmc_ray.reports.render import percent, render

_PROMISED, _UNCALIBRATED = "promised by the scores", "mean score, not calibrated"


def lines(live: LivePrecision, tally: Tally, calibrated: bool) -> Iterator[str]:
    """The same as `live_report`, for a console."""
    yield str(tally)
    yield f"precision of judged tags: {share(live.total)}; {live.missed:,} accepted labels were not tagged"
    for day, part in live.nights.items():
        yield f"dt={day}  {share(part)}"
    for low, high, part, mean in live.by_score():
        yield f"scores {low:.1f} to {high:.1f}  {share(part)}  {percent(mean)} {_PROMISED if calibrated else _UNCALIBRATED}"
    for label, part in live.worst():
        yield f"label {one_line(label)}  {share(part)}"


def live_report(title: str, live: LivePrecision, tally: Tally, calibrated: bool) -> str:
    """The page, from ``<!doctype html>`` on; to be written in UTF-8. ``calibrated``: whether scores are meant as chances."""
    return render(
        "live.html.j2",
        title=title,
        warnings=[] if not tally.left_out else [str(tally)],
        live=live,
        tally=tally,
        promised=_PROMISED if calibrated else _UNCALIBRATED,
        enough=ENOUGH,
        interval=interval,
    )


def share(part: Share) -> str:
    """Such as "85.0% of 20 (64.0% to 94.8%)"."""
    return f"{percent(part.accepted / part.judged)} of {part.judged:,} ({interval(part)})" if part.judged else "none judged"


def interval(part: Share) -> str:
    """Such as "64.0% to 94.8%"."""
    return f"{percent(part.low)} to {percent(part.high)}"

"""How right the tags of the latest nights are, by what editors have said of them: ``jobs/nights.py feedback``."""

from collections.abc import Callable

from xmc_ray import storage
from xmc_ray.data.feedback import Feedback
from xmc_ray.data.reader import check_unchanged
from xmc_ray.errors import DataError
from xmc_ray.metrics.live import LivePrecision
from xmc_ray.on_ray.tag.nights import COUNTS, TAGS, all_nights, day_of, manifest_of, marked_run, tag_files
from xmc_ray.reports.live import lines, live_report
from xmc_ray.storage.files import join
from xmc_ray.storage.places import check_apart


def show(output: str, feedback: str, last: int, report: str | None, say: Callable[[str], None] = print) -> LivePrecision:
    """Print the live precision of the ``last`` finished nights of an output, and write it to ``report``, if that is given.

    Raises DataError for feedback that cannot be read or is of another label set, and if no night is finished; ConfigError for a
    report among the tags or the feedback.
    """
    check_apart({"report": report}, {"tags": join(output, TAGS), "feedback": feedback})
    verdicts = Feedback.read(feedback)
    folders = [folder for folder in all_nights(output) if marked_run(folder) is not None][-last:][::-1]
    if not folders:
        raise DataError("no night is finished", where=output)
    live = LivePrecision(verdicts)
    for folder in folders:
        for file in tag_files(folder):
            live.update(storage.read_parquet(file.uri, ["id", "labels", "scores"]))
            check_unchanged(file)
        live.end_night(day_of(folder))
    labels = storage.read_parquet(join(folders[0], COUNTS))["label"].combine_chunks()
    tally, calibrated = live.tally(labels), all(manifest_of(folder).get("calibrated") for folder in folders)
    for line in lines(live, tally, calibrated):
        say(line)
    if report is not None:
        storage.write_bytes(report, live_report(output, live, tally, calibrated).encode())
    return live

"""Live precision, against the same in words."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_nights import write_night

from xmc_ray.errors import DataError, XmcError
from xmc_ray.metrics.live import Share
from xmc_ray.show.feedback import feedback_of, live_precision
from xmc_ray.show.night import read_night

DOCUMENTS = [("d1", "", {"a": 0.9, "b": 0.5}), ("d2", "", {"a": 0.9}), ("d3", "", {})]
VERDICTS = [("d1", "a", "Accepted", 1), ("d1", "b", "accepted", 1), ("d1", "b", "rejected ", 2), ("d2", "b", "accepted", 1)]
VERDICTS += [("d2", "a", "accepted", 9), ("d2", "a", "rejected", 3), ("d3", "a", "rejected", 1), ("d2", "a", "perhaps", 99)]


def write(folder: Path, **columns: Any) -> None:
    names = ("id", "label", "verdict", "at")
    table = dict(zip(names, (list(column) for column in zip(*VERDICTS, strict=True)), strict=True))
    table["at"] = [datetime(2026, 11, 20) + timedelta(day) for day in table["at"]]
    pq.write_table(
        pa.table({name: values for name, values in (table | columns).items() if values is not None}),
        folder / "feedback.parquet",
    )


def test_the_latest_verdicts_of_tags_count(tmp_path: Path) -> None:
    night = read_night(str(write_night(tmp_path / "out", "2026-11-24", DOCUMENTS)))
    assert feedback_of(night.folder, str(tmp_path)) is None
    write(tmp_path)
    feedback = feedback_of(night.folder, str(tmp_path))
    assert feedback is not None
    live = live_precision(night.files, feedback)
    assert live == Share.of(accepted=2, judged=3) and live.low < 2 / 3 < live.high


def test_what_is_no_feedback_is_an_error(tmp_path: Path) -> None:
    night = read_night(str(write_night(tmp_path / "out", "2026-11-24", DOCUMENTS)))
    write(tmp_path, verdict=None)
    feedback = feedback_of(str(tmp_path))
    assert feedback is not None
    with pytest.raises(DataError, match="no column 'verdict'"):
        live_precision(night.files, feedback)


def test_a_file_of_tags_that_is_damaged_or_has_gone_is_an_error(tmp_path: Path) -> None:
    night = read_night(str(write_night(tmp_path / "out", "2026-11-24", DOCUMENTS)))
    write(tmp_path)
    feedback = feedback_of(str(tmp_path))
    assert feedback is not None
    (file,) = (Path(file.uri) for file in night.files)
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(len(whole) // 4) + whole[4 + len(whole) // 4 :])
    with pytest.raises(XmcError, match=r"read.*part-run20261124"):
        live_precision(night.files, feedback)
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        live_precision(night.files, feedback)

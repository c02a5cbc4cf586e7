"""Feedback: verdicts against a slow twin; what is wrong with its files, in one line each."""

import datetime as dt
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.feedback import Feedback, FeedbackConfig
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import DataError

WORDS = ["accepted", "rejected", " Accepted ", "REJECTED", "perhaps", "", None]
TIMES = [None, *(dt.datetime(2026, 11, day, tzinfo=dt.timezone.utc) for day in (1, 2))]
ROWS = st.tuples(
    st.sampled_from(["d1", "d2", "d3", "unknown", "", None]),
    st.sampled_from(["a", "b", " b", "c", "new", "", None]),
    st.sampled_from(WORDS),
    st.sampled_from(TIMES),
)
LABELS = pa.array(["a", "b", "c"])


def table_of(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = [*zip(*rows, strict=True)] or [[]] * 4
    types = [pa.string()] * 3 + [pa.timestamp("ms", "UTC")]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    return pa.table(arrays, ["id", "label", "verdict", "at"])


def row(label: str = "a", verdict: str | None = "accepted", **others: Any) -> dict[str, Any]:
    return {"id": "d1", "label": label, "verdict": verdict, **others}


def verdicts_of(feedback: Feedback) -> dict[tuple[str, str], bool]:
    ids = np.repeat(np.array(feedback.ids.to_pylist(), object), np.diff(feedback.start_U1))
    labels = feedback.labels.take(pa.array(feedback.label_V)).to_pylist()
    return dict(zip(zip(ids.tolist(), labels, strict=True), feedback.accepted_V.tolist(), strict=True))


@settings(deadline=None)
@given(
    st.lists(ROWS, max_size=30),
    st.lists(st.tuples(st.sampled_from(["d1", "d2", "d3", "d4", None]), st.lists(st.sampled_from("abc"), unique=True))),
)
def test_verdicts_and_the_truth_they_correct(
    rows: list[tuple[Any, ...]], documents: list[tuple[str | None, list[str]]]
) -> None:
    """Documents may come twice or without an id; labels may be unknown."""
    latest, left_out = reference.verdicts(rows)
    if rows and not latest:
        with pytest.raises(DataError, match="the feedback has no verdict"):
            Feedback.of(table_of(rows))
        return
    feedback = Feedback.of(table_of(rows))
    assert verdicts_of(feedback) == latest and len(feedback) == len(latest)
    assert dict(feedback.left_out) == left_out

    ids, lists = (
        pa.array([row[side] for row in documents], kind) for side, kind in ((0, pa.string()), (1, pa.list_(pa.string())))
    )
    index = LabelIndex(LABELS, np.zeros(3, np.int64), pa.nulls(3, pa.string()), 0)
    corrected = feedback.corrected(index.encode(lists), feedback.of_documents(ids), LABELS)
    truth, judged = ([[LABELS[number].as_py() for number in labels] for labels in part.to_pylist()] for part in corrected)
    expected = [reference.corrected(latest, identity, labels) for identity, labels in documents]
    assert [sorted(labels) for labels in truth] == [right for right, _ in expected]
    assert [sorted(labels) for labels in judged] == [sorted(set(said) & {*"abc"}) for _, said in expected]
    assert all(len(set(labels)) == len(labels) for labels in (*truth, *judged))
    for labels, (_, before) in zip(truth, documents, strict=True):  # what was there stays in order
        assert [label for label in labels if label in before] == [label for label in before if label in labels]


def test_its_fingerprint_is_that_of_what_counts() -> None:
    day = TIMES[1]
    rows = [("d1", "a", "accepted", day), ("d1", "b", "rejected", day), ("d2", "a", "accepted", day)]
    first = Feedback.of(table_of(rows)).fingerprint
    overruled = ("d1", "a", "rejected", None)
    assert Feedback.of(table_of([*rows[::-1], overruled, ("d9", "a", "perhaps", day)])).fingerprint == first
    assert Feedback.of(table_of(rows[:2])).fingerprint != first
    assert Feedback.of(table_of([("d1", "a", "rejected", TIMES[2]), *rows])).fingerprint != first
    assert len(first) == 16


def test_a_folder_of_files_with_integers_and_times_of_several_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    (folder / "_old").mkdir(parents=True)
    pq.write_table(
        pa.table({"id": [7, 8], "label": [1, 1], "verdict": ["accepted"] * 2, "editor": ["x"] * 2}), folder / "1.parquet"
    )
    later = {"id": ["7"], "label": ["1"], "verdict": ["rejected"], "at": pa.array([dt.date(2026, 11, 1)])}
    pq.write_table(pa.table(later), folder / "0.parquet")
    pq.write_table(pa.table({"nothing": [1]}), folder / "_old" / "0.parquet")
    feedback = Feedback.read(str(folder))
    assert verdicts_of(feedback) == {("7", "1"): False, ("8", "1"): True}  # what has no time comes first
    assert feedback.left_out["overruled by later ones"] == 1


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    pq.write_table(table_of([]), tmp_path / "empty.parquet")
    feedback = Feedback.read(str(tmp_path / "empty.parquet"))
    assert not len(feedback) and feedback.of_documents(pa.array(["d1"])).to_pylist() == [[]]


def test_what_counts_is_told_in_one_line() -> None:
    rows = [("d1", "a", "accepted", None), ("d1", "b", "rejected", None), ("d2", "new", "accepted", None)]
    feedback = Feedback.of(
        table_of([*rows, ("gone", "c", "rejected", None), ("d1", None, "accepted", None), ("d1", "a", "x", None)])
    )
    found = np.array([True, True, True, False])
    assert str(feedback.tally(found, LABELS)) == (
        "feedback: 1 accepted and 1 rejected labels of documents; left out: 1 incomplete rows, 1 rows with another verdict, "
        "1 of unknown documents, 1 of unknown labels"
    )


def test_feedback_of_another_label_set() -> None:
    rows = [("d1", label, "accepted", None) for label in ("x", "y", "a")]
    feedback = Feedback.of(table_of(rows), "there")
    with pytest.raises(DataError) as error:
        feedback.tally(np.ones(3, bool), LABELS)
    assert str(error.value) == (
        "the feedback is of another label set: there; found 2 of 3 labels unknown, such as x; expected labels of these "
        "documents, such as a; give verdicts on tags of a model of these labels"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"id": ["1"], "label": ["a"]},
            "the feedback has no column 'verdict'.*found id, label.*expected columns id, label, verdict",
        ),
        ({"id": [1.5], "label": ["a"], "verdict": ["accepted"]}, "column 'id' of the feedback has a wrong type.*found double"),
        ({"id": [1], "label": ["a"], "verdict": [1]}, "column 'verdict' of the feedback has a wrong type.*expected strings$"),
        ({"id": [1], "label": ["a"], "verdict": ["yes"]}, "has no verdict.*1 rows with 'yes'; expected accepted or rejected"),
        ({"id": [1], "label": [None], "verdict": [None]}, "has no verdict.*1 rows with empty cells"),
        (
            {"id": [1], "label": ["a"], "verdict": ["accepted"], "at": ["noon"]},
            "column 'at' of the feedback is no time.*found 'noon' in row 0; expected as 2026-",
        ),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "feedback.parquet")
    with pytest.raises(DataError, match=f"(?s){message}") as error:
        Feedback.read(str(tmp_path / "feedback.parquet"))
    assert "feedback.parquet" in str(error.value) and "\n" not in str(error.value)


def test_times_with_an_offset_and_without_cannot_be_compared(tmp_path: Path) -> None:
    lines = ["id,label,verdict,at", "a,x,rejected,2026-11-02T10:00:00", "a,x,accepted,2026-11-02T10:00:00Z"]
    (tmp_path / "verdicts.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"no time: .*; found times with an offset from UTC and others without"):
        Feedback.read(str(tmp_path))


def test_all_tables_of_a_folder_are_read_and_what_is_none_is_told(tmp_path: Path) -> None:
    for number, name in enumerate(("a.csv", "b.CSV", "c.json", "d.jsonlines")):
        row = {"id": f"{number}", "label": "x", "verdict": "accepted"}
        lines = ["id,label,verdict", ",".join(row.values()), "  ,x,accepted"] if "sv" in name.lower() else [json.dumps(row)]
        (tmp_path / name).write_text("\n".join(lines))
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(b"id,label,verdict\n4,x,rejected"))
    (tmp_path / "notes\n.txt").write_text("ask again")
    feedback = Feedback.read(str(tmp_path))
    assert feedback.ids.to_pylist() == ["0", "1", "2", "3", "4"] and feedback.accepted_V.tolist() == [True] * 4 + [False]
    assert feedback.left_out["incomplete rows"] == 2
    told = str(feedback.tally(np.ones(5, bool), pa.array(["x"])))
    assert told.endswith(f"left out: 2 incomplete rows, 1 files that are no tables, such as {tmp_path}/notes .txt")


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("id,label,verdict")
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError):
            Feedback.read(str(place))
    with pytest.raises(DataError, match="not a Parquet file"):
        Feedback.read(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("zone", ["", "Z", "+01:00"])
def test_a_spreadsheet_of_verdicts(tmp_path: Path, zone: str) -> None:
    """The later of two counts, in whatever order they stand."""
    lines = [
        "id,label,verdict,at",
        f"a,x,rejected,2026-11-02T10:00:00{zone}",
        f"a,x,accepted,2026-11-01T10:00:00{zone}",
        "b,y,,",
    ]
    (tmp_path / "verdicts.csv").write_text("\n".join(lines))
    feedback = Feedback.read(str(tmp_path))
    assert feedback.accepted_V.tolist() == [False] and feedback.left_out["incomplete rows"] == 1
    (tmp_path / "verdicts.csv").write_text("\n".join([*lines, "a,x,rejected,last week"]))
    with pytest.raises(DataError, match="column 'at' of the feedback is no time"):
        Feedback.read(str(tmp_path))


def test_there_is_a_weight_only_with_feedback() -> None:
    assert FeedbackConfig().judged_weight is None and FeedbackConfig(uri="x", weight=3).judged_weight == 3

"""Settings are checked before anything runs, and absence in a sample is no proof (samples late-key, null-label-column)."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xmc_ray.data import input_columns
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.reader import Segment, read_file, read_rows
from xmc_ray.errors import DataError

LABELLED = Rules.of(DocumentsConfig(uri="/x"), labelled=True)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_column_that_comes_late_is_found_in_a_later_file(suffix: str, tmp_path: Path) -> None:
    for number in range(20):
        write_rows(tmp_path / f"{number:02}.{suffix}", [{"id": f"{number}", "text": "a"}])
    write_rows(tmp_path / f"99.{suffix}", [{"id": "99", "text": "a", "labels": ["x"]}])
    config = DocumentsConfig(uri=str(tmp_path))
    check_columns(list_inputs(config).files, LABELLED)
    tables = list(read_rows(config, labelled=True))
    assert [row for table in tables for row in table["labels"].to_pylist()] == [*([[]] * 20), ["x"]]
    (tmp_path / f"99.{suffix}").unlink()
    with pytest.raises(DataError, match=r"no column 'labels': .*00\..*; found id, text; expected a list of strings"):
        check_columns(list_inputs(config).files, LABELLED)


@pytest.mark.parametrize("late", [99, 100, 150, 1023, 1024, 5000])
def test_a_key_that_comes_late_is_found_in_a_later_line(late: int, tmp_path: Path) -> None:
    path, config = tmp_path / "x.jsonl", DocumentsConfig(uri=str(tmp_path), labels="Wörter")
    rows: list[dict[str, Any]] = [{"id": f"{n}", "text": 'the "Wörter" of it', "in": {"Wörter": 1}} for n in range(late)]
    rules = Rules.of(config, labelled=True)
    for ensure_ascii in (True, False):
        text = [json.dumps(row, ensure_ascii=ensure_ascii) for row in [*rows, {"id": "last", "text": "t", "Wörter": ["x"]}]]
        path.write_text("\n".join(text))
        check_columns(list_inputs(config).files, rules)
    path.write_text("\n".join(text[:-1]))
    with pytest.raises(DataError, match="no column 'Wörter'"):
        check_columns(list_inputs(config).files, rules)


def test_what_is_not_searched_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels may still come; a text that none of so many rows has is a wrong setting."""
    for number in range(3):
        write_rows(tmp_path / f"{number}.jsonl", [{"id": f"{number}", "text": "a"}] * 2000)
    files = list_inputs(DocumentsConfig(uri=str(tmp_path))).files
    for limit in ("_LOOK_FILES", "_LOOK_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(input_columns, limit, 2)
            check_columns(files, LABELLED)
            with pytest.raises(DataError, match="no column 'title'"):
                check_columns(files, Rules.of(DocumentsConfig(uri="/x", text=["title"]), labelled=True))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_one_odd_file_is_read_or_rejected_row_by_row(suffix: str, tmp_path: Path) -> None:
    """Null types, missing columns, other types, no rows: alike in both formats; the rest of the catalogue is not touched."""
    good = [{"id": "g", "text": "a", "labels": ["x"]}]
    odd: list[list[dict[str, Any]]] = [
        [{"id": "n", "text": "a", "labels": None}],
        [{"id": "m", "text": "a"}],
        [{"id": "f", "text": "a", "labels": [1.5]}],
        [{"id": "t", "text": 7, "labels": ["x"]}],
        [{"other": 1}],
        [],
    ]
    for number, rows in enumerate([*odd, good]):
        write_rows(tmp_path / f"{number}.{suffix}", rows)
    config = DocumentsConfig(uri=str(tmp_path))
    files = list_inputs(config).files
    check_columns(files, LABELLED)
    found = [row for file in files for part in read_file(Segment(file), LABELLED) for row in part.table.to_pylist()]
    assert [(row["id"], row["labels"], row["reason"]) for row in found] == [
        ("n", [], None),
        ("m", [], None),
        ("f", [], "labels is not a list of strings or integers"),
        ("t", ["x"], "text is not a string"),
        (None, [], "id is null"),
        ("g", ["x"], None),
    ]
    tables = read_rows(config, labelled=True, max_reject_share=0.5)
    assert [row["id"] for table in tables for row in table.to_pylist()] == ["n", "m", "g"]

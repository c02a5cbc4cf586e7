"""Splits as Hugging Face datasets saves them: Arrow's IPC stream, with the library's own schema, and what lies beside."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from xmc_ray import storage
from xmc_ray.data.columns import document_columns
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.reader import Segment, read_file, read_rows
from xmc_ray.errors import DataError

FEATURES = {
    "id": {"dtype": "int64", "_type": "Value"},
    "text": {"dtype": "large_string", "_type": "Value"},
    "labels": {"feature": {"names": ["red", "blue"], "_type": "ClassLabel"}, "_type": "List"},
}


def save(folder: Path, rows: int, metadata: bytes | None = None) -> None:
    """A split in two files, in batches of two rows."""
    folder.mkdir(parents=True)
    features = json.dumps({"info": {"features": FEATURES}}).encode() if metadata is None else metadata
    schema = pa.schema(
        {"id": pa.int64(), "text": pa.large_string(), "labels": pa.list_(pa.int64())}, {b"huggingface": features}
    )
    for part in range(2):
        table = pa.table(
            {
                "id": [*range(part * rows, (part + 1) * rows)],
                "text": [f"text {number}" for number in range(rows)],
                "labels": [[number % 2, 1] for number in range(rows)],
            },
            schema,
        )
        with (
            pa.OSFile(str(folder / f"data-0000{part}-of-00002.arrow"), "wb") as file,
            pa.ipc.new_stream(file, schema) as stream,
        ):
            stream.write_table(table, max_chunksize=2)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")


def test_a_saved_split_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    save(tmp_path / "train", 5)
    config = DocumentsConfig(uri=str(tmp_path / "train"))
    assert not list_inputs(config).left_out and len(list_inputs(config).files) == 2
    rows = [row for table in read_rows(config, labelled=True) for row in table.to_pylist()]
    assert [row["id"] for row in rows] == [str(number) for number in range(10)]
    assert [row["labels"] for row in rows[:3]] == [["red", "blue"], ["blue"], ["red", "blue"]]


def test_lists_of_classes_as_earlier_versions_wrote_them_and_arrows_file_format(tmp_path: Path) -> None:
    features = FEATURES | {"labels": [{"names": ["red", "blue"], "_type": "ClassLabel"}]}
    save(tmp_path / "train", 5, json.dumps({"info": {"features": features}}).encode())
    config = DocumentsConfig(uri=str(tmp_path / "train"))
    expected = [row for table in read_rows(config, labelled=True) for row in table.to_pylist()]
    assert [row["labels"] for row in expected[:3]] == [["red", "blue"], ["blue"], ["red", "blue"]]
    for path in (tmp_path / "train").glob("*.arrow"):
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert [row for table in read_rows(config, labelled=True) for row in table.to_pylist()] == expected


def test_a_dataset_of_the_library_is_read_as_its_files_and_as_its_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["red", "blue"]))}
    )
    texts, labels = ["one", "two", "three"], [["red"], [], ["blue", "red"]]
    dataset = datasets.Dataset.from_dict({"text": texts, "labels": labels}, features)
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path)
    (table,) = read_rows(DocumentsConfig(uri=str(tmp_path / "train"), id=None), labelled=True)
    assert table.select(["text", "labels"]).to_pydict() == {"text": texts, "labels": labels}
    columns = document_columns(dataset["text"], dataset["labels"])
    assert [column.to_pylist() for column in columns] == [texts, [["0"], [], ["1", "0"]]]
    with pytest.raises(DataError, match=r"several splits.*found train"):
        list_inputs(DocumentsConfig(uri=str(tmp_path)))


@pytest.mark.parametrize("start", range(5))
def test_reading_begins_at_any_row(tmp_path: Path, start: int) -> None:
    save(tmp_path / "train", 5, b"no JSON")
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=True)
    file = storage.stat(tmp_path / "train" / "data-00001-of-00002.arrow")
    rows = [row for part in read_file(Segment(file, start, start, 2), rules, 1) for row in part.table.to_pylist()]
    expected = [(str(5 + row), row, [str(row % 2), "1"][row % 2 :]) for row in range(start, min(start + 2, 5))]
    assert [(row["id"], row["row"], row["labels"]) for row in rows if row["reason"] is None] == expected
    assert len(rows) == 2


def test_several_splits_and_a_damaged_file_are_told(tmp_path: Path) -> None:
    for split in ("test", "train"):
        save(tmp_path / split, 2)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"a folder of several splits: .*; found test, train; .*give one, such as .*/test"):
        list_inputs(DocumentsConfig(uri=str(tmp_path)))
    path = tmp_path / "train" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:300])
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    assert [part.reject.reason for part in read_file(Segment(storage.stat(path)), rules) if part.reject] == ["cannot be read"]

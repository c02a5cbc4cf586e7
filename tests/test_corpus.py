"""Documents in and tags out: every row is accounted for, on local folders and on a real S3 server."""

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from conftest import S3
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import corpus, storage
from xmc_ray import sink as sinks
from xmc_ray.corpus import DocumentsConfig, list_inputs, read_documents, text_digest
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.sink import TagSink
from xmc_ray.storage import arrow_filesystem, join

COLUMNS = DocumentsConfig(uri="").columns(labelled=True)

# A line, and what is wrong with it.
BAD_LINES = {
    '{"id": "1", "text": null}': "text is null",
    '{"id": "2"}': "text is null",
    '{"id": "3", "text": " \\n\\u3000"}': "text is empty",
    '{"id": "4", "text": 7}': "text is not a string (int)",
    '{"id": "5", "text": ["a"]}': "text is not a string (list)",
    '{"text": "a"}': "id is null",
    '{"id": "", "text": "a"}': "id is empty",
    '{"id": 1.5, "text": "a"}': "id is not a string or an integer (float)",
    '{"id": true, "text": "a"}': "id is not a string or an integer (bool)",
    '{"id": "6", "text": "a", "labels": "b"}': "labels is not a list of strings (str)",
    '{"id": "7", "text": "a", "labels": ["b", 1]}': "labels is not a list of strings (list)",
    "null": "not a JSON object (NoneType)",
    '["a"]': "not a JSON object (list)",
    '{"id": "8", "text": "a"': "invalid JSON: Expecting ',' delimiter",
    '{"id": "9", "text": "\\ud800"}': "invalid JSON: UnicodeEncodeError",
    "[" * 100_000: "invalid JSON: RecursionError",
}


def parse(lines: bytes, *, columns: Any = COLUMNS) -> list[dict[str, Any]]:
    rows = corpus._Rules(columns, "\n", "").from_json(lines, "file").to_pylist()
    assert all(row.pop("file") == "file" for row in rows)
    return rows


def from_parquet(table: pa.Table, *texts: str, separator: str = "\n") -> list[dict[str, Any]]:
    columns = DocumentsConfig(uri="", text=list(texts or ["text"])).columns(labelled="labels" in table.column_names)
    paths = pa.repeat("bucket/file", len(table))
    rows = corpus._Rules(columns, separator, "s3://").from_parquet(table.append_column("path", paths)).to_pylist()
    assert all(row.pop("file") == "s3://bucket/file" for row in rows)
    return rows


def write_parquet(uri: str, columns: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def read_parts(folder: str) -> pa.Table:
    """All parts that lie directly in ``folder``."""
    parts = [file.uri for file in storage.list_files(folder) if file.uri.rpartition("/")[0] == folder]
    assert all(part.startswith("part-") for part in (uri.rpartition("/")[2] for uri in parts))
    return pa.concat_tables(pq.read_table(path, filesystem=fs, partitioning=None) for fs, path in map(arrow_filesystem, parts))


# --- rows


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_one_rejected_row(line: str) -> None:
    good = b'{"id": "good", "text": "a", "labels": ["x"]}'
    rows = parse(b"\n".join([good, line.encode(), good]))
    assert [row["reason"] for row in rows] == [None, BAD_LINES[line], None]
    assert rows[0] == rows[2] == {"id": "good", "text": "a", "labels": ["x"], "reason": None}
    assert rows == [parse(good)[0], parse(line.encode())[0], parse(good)[0]]


def test_bytes_that_are_no_text_are_rejected() -> None:
    assert [row["reason"] for row in parse(b'{"id": "\xff", "text": "a"}\n{"id": "b", "text": "b"}')] == [
        "invalid JSON: UnicodeDecodeError",
        None,
    ]
    latin = pa.array([b"a", b"\xe4", None]).view(pa.string())
    text = pa.array(["x", "y", "z"])
    assert [row["reason"] for row in from_parquet(pa.table({"id": latin, "text": text}))] == [
        None,
        "id is not UTF-8",
        "id is null",
    ]
    assert [row["reason"] for row in from_parquet(pa.table({"id": text, "text": latin}))] == [
        None,
        "text is not UTF-8",
        "text is null",
    ]


@pytest.mark.parametrize(
    "lines", [b'{"id": 1, "text": "a"}', b'\xef\xbb\xbf{"id": "1", "text": "a"}\r', b'  {"text":"a","id":"1"} ']
)
def test_unusual_but_good_lines(lines: bytes) -> None:
    assert parse(lines + b"\n" + lines) == [{"id": "1", "text": "a", "labels": [], "reason": None}] * 2


def test_labels_are_unique_and_never_null() -> None:
    labels = [["b", "a", "b", None], None, [], [None], ["c"]]
    expected = [["b", "a"], [], [], [], ["c"]]
    lines = [json.dumps({"id": n, "text": "t", "labels": row}).encode() for n, row in enumerate(labels)]
    assert [row["labels"] for row in parse(b"\n".join(lines))] == expected
    table = pa.table({"id": range(5), "text": ["t"] * 5, "labels": pa.array(labels, pa.large_list(pa.large_string()))})
    assert [row["labels"] for row in from_parquet(table)] == expected
    assert [row["labels"] for row in from_parquet(table.slice(2))] == expected[2:]


def test_string_types_of_parquet() -> None:
    text = pa.array(["a", None, "a"])
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        rows = from_parquet(pa.table({"id": pa.array([2**63, 1, 0], pa.uint64()), "text": text.cast(kind)}))
        assert [(row["id"], row["text"]) for row in rows] == [(str(2**63), "a"), ("1", None), ("0", "a")]


PARTS = st.none() | st.text(st.sampled_from(" \t\n\u3000ab"), max_size=3)


@given(st.lists(st.tuples(PARTS, PARTS, PARTS)), st.sampled_from(["\n", " | ", ""]))
@settings(deadline=None)
def test_joined_texts_are_those_of_a_plain_loop(rows: list[tuple[str | None, ...]], separator: str) -> None:
    columns = {name: pa.array(values, pa.string()) for name, values in zip("abc", zip(*rows, strict=True), strict=False)}
    columns = columns or dict.fromkeys("abc", pa.array([], pa.string()))
    found = from_parquet(pa.table({"id": range(len(rows)), **columns}), "a", "b", "c", separator=separator)
    for row, parts in zip(found, rows, strict=True):
        filled = [part for part in parts if part is not None and part.strip()]
        empty = "text is null" if all(part is None for part in parts) else "text is empty"
        assert row["text"] == (separator.join(filled) if filled else None)
        assert row["reason"] == (None if filled else empty)


VALUES = st.none() | st.integers(0, 9) | st.text(max_size=3) | st.lists(st.none() | st.text(max_size=2), max_size=3)
OBJECTS = st.dictionaries(st.sampled_from(["id", "text", "labels", "other"]), VALUES).map(json.dumps)
ODD = st.sampled_from(
    ["", " ", "null", "3", "[]", "{}", "{", "}{", "{}{}", '{"id": 1, "id": 2}', '{"other": {"id": "x"}}', " {} "]
)


@given(st.lists(OBJECTS | ODD, min_size=1))
@settings(deadline=None)
def test_fast_parser_agrees_with_the_slow_one(lines: list[str]) -> None:
    data = "\n".join(lines).strip().encode() or b"{}"
    slow = [column.to_pylist() for column in corpus._parse_one_by_one(data, COLUMNS)]
    fast = corpus._parse_at_once(data, COLUMNS)
    assert fast is None or [column.to_pylist() for column in fast] == slow


@given(st.lists(st.binary(max_size=5)), st.integers(1, 9))
@settings(deadline=None)
def test_no_line_is_lost_between_reads(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_JSON_BYTES", size)
        pieces = list(corpus._whole_lines(io.BytesIO(data)))
    found = [line.strip() for piece in pieces for line in piece.split(b"\n")]
    assert all(pieces)
    assert [line for line in found if line] == [line.strip() for line in data.split(b"\n") if line.strip()]


def test_text_digest() -> None:
    expected = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in ("", "Größe")]
    assert text_digest(pa.array(["", None, "Größe"])).to_pylist() == [expected[0], None, expected[1]]


# --- files


GOOD = {"id": ["a"], "text": ["b"], "labels": [["c"]]}
BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing column": (
        {"sku": ["a"], "text": ["b"], "labels": [["c"]]},
        "no column 'id'.*found sku, text, labels.*documents.id",
    ),
    "text is a number": (GOOD | {"text": [1]}, "'text' has a wrong type.*int64; expected a string; set documents.text"),
    "text is bytes": (GOOD | {"text": [b"x"]}, "found binary"),
    "id is a float": (GOOD | {"id": [1.5]}, "found double; expected a string or an integer"),
    "labels are a string": (GOOD | {"labels": ["c"]}, "found string; expected a list of strings"),
    "labels are numbers": (GOOD | {"labels": [[1]]}, "list<.*int64>; expected a list of strings"),
    "no rows": ({name: pa.array([], pa.string()) for name in GOOD}, "no documents.*1 files without rows"),
    "missing key": ('{"id": 1, "labels": []}\n', "no column 'text'.*found id, labels"),
    "a JSON array": ('[\n  {"id": 1,\n  "text": "a"}\n]', r"not JSON lines.*found '\['"),
    "no lines": ("\n \n", "no documents"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used_are_named_before_anything_runs(case: str, tmp_path: Path) -> None:
    content, told = BAD_FILES[case]
    path = tmp_path / ("x.jsonl" if isinstance(content, str) else "x.parquet")
    _ = path.write_text(content) if isinstance(content, str) else write_parquet(str(path), content)
    with pytest.raises(DataError, match=rf"{tmp_path}.*") as caught:
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=True)
    assert caught.match(told)


def test_further_files_that_cannot_be_used(tmp_path: Path) -> None:
    documents = DocumentsConfig(uri=str(tmp_path))
    with pytest.raises(DataError, match=r"no input.*\*\.parquet or \*\.jsonl"):
        list_inputs(documents)
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match=r"not a Parquet file.*a\.parquet"):
        read_documents(documents, labelled=False)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match=r"different kinds.*\*\.json and \*\.parquet.*either \*\.parquet or \*\.jsonl"):
        list_inputs(documents)
    (tmp_path / "b.json").rename(tmp_path / "what?.parquet")
    with pytest.raises(DataError, match=r"question mark.*what\?\.parquet"):
        list_inputs(documents)
    with pytest.raises(DataError, match=r"nowhere; found nothing"):
        list_inputs(DocumentsConfig(uri=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="no column"):
        DocumentsConfig(uri="x", text=[])


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-20])
    with pytest.raises(ConfigError, match=r"cannot be read.*a\.jsonl\.gz"):
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False)


def test_what_ray_cannot_read_is_one_clear_line(tmp_path: Path, ray_session: None) -> None:
    write_parquet(f"{tmp_path}/0.parquet", {"id": pa.array([], pa.string())})  # no rows, no say
    write_parquet(f"{tmp_path}/1.parquet", {"id": ["a"], "text": ["b"], "labels": [1], "path": ["c"]})
    with pytest.raises(DataError, match=r"'labels' has a wrong type.*1\.parquet"):
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=True)
    assert read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False) is not None
    with pytest.raises(DataError, match=r"duplicate column names.*path"):
        read_documents(DocumentsConfig(uri=str(tmp_path), text=["path"]), labelled=False)
    write_parquet(f"{tmp_path}/2.parquet", {"id": ["a"], "text": [1]})
    with pytest.raises(DataError, match="text has incompatible types: string vs int64"):
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False)


# --- streams


def write_json(uri: str, columns: dict[str, Any]) -> str:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    storage.write_bytes(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return uri


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_documents_are_the_same_from_everywhere(place: str, suffix: str, tmp_path: Path, s3: S3, ray_session: None) -> None:
    folder = join(str(tmp_path) if place == "local" else s3.uri("corpus"), suffix)
    write = write_parquet if suffix == "parquet" else write_json
    columns = {"sku": [3, 4, 5, None], "title": ["t", None, None, "t"], "body": ["b", " ", None, "b"]}
    columns |= {"topics": [["x", "x"], None, [], ["y"]], "path": [1, 2, 3, 4]}
    write(join(folder, f"dt=1/a.{suffix}"), {name: pa.array(values).slice(0, 0) for name, values in columns.items()})
    uri = write(join(folder, f"dt=2/b c#%20ü.{suffix}"), columns)
    write(join(folder, f"_old/c.{suffix}"), columns)
    documents = DocumentsConfig(uri=folder, id="sku", text=["title", "body"], separator=" - ", labels="topics")

    assert [Path(file.uri).name for file in list_inputs(documents)] == [f"a.{suffix}", f"b c#%20ü.{suffix}"]
    rows = sorted(read_documents(documents, labelled=True).take_all(), key=lambda row: str(row["id"]))
    assert [{**row, "labels": list(row["labels"])} for row in rows] == [
        {"id": "3", "text": "t - b", "labels": ["x"], "file": uri, "reason": None},
        {"id": "4", "text": None, "labels": [], "file": uri, "reason": "text is empty"},
        {"id": "5", "text": None, "labels": [], "file": uri, "reason": "text is null"},
        {"id": None, "text": "t - b", "labels": ["y"], "file": uri, "reason": "id is null"},
    ]


@pytest.fixture
def fake_tags() -> Callable[[pa.Table], pa.Table]:
    """Stands in for the model; not a plain function, because Ray's workers cannot import this module."""

    def tag(table: pa.Table) -> pa.Table:
        lengths = [len(text or "") % 3 for text in table["text"].to_pylist()]
        columns = {
            "labels": pa.array([[f"label{n}" for n in range(length)] for length in lengths], pa.list_(pa.string())),
            "scores": pa.array([[1 - n / 4 for n in range(length)] for length in lengths], pa.list_(pa.float64())),
            "model": pa.repeat("bundle", len(table)),
            "text_digest": text_digest(table["text"]),
            "truncated": pa.array([length == 2 for length in lengths]).cast(pa.int8()),
        }
        return pa.table({name: table[name] for name in table.column_names} | columns)

    return tag


def test_rows_in_are_rows_tagged_and_rows_rejected(
    tmp_path: Path, fake_tags: Callable[[pa.Table], pa.Table], ray_session: None
) -> None:
    texts = {str(n): "x" * n for n in range(1, 31)}
    good = [json.dumps({"id": int(key), "text": text}) for key, text in texts.items()]
    bad = {line: reason for line, reason in BAD_LINES.items() if not reason.startswith("labels")}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(good[:10]) + "\n\n")
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress("\n".join([*good[10:20], *bad]).encode()))
    (tmp_path / "in/c.json").write_text("\n".join(good[20:]))
    documents = read_documents(DocumentsConfig(uri=str(tmp_path / "in")), labelled=False)
    out = str(tmp_path / "out" / "dt=1")
    sink = TagSink(out, sums=["truncated"], rows_per_file=20)
    documents.map_batches(fake_tags, batch_format="pyarrow", batch_size=None).write_datasink(sink)

    tags, rejects = read_parts(out), read_parts(join(out, "rejects"))
    assert tags.schema == pa.schema({name: kind for name, kind in sinks._TAGS.items() if name != "names"})
    assert rejects.schema == pa.schema(sinks._REJECTS)
    digests = dict(zip(texts, text_digest(pa.array(texts.values())).to_pylist(), strict=True))
    assert sorted(zip(tags["id"].to_pylist(), tags["text_digest"].to_pylist(), strict=True)) == sorted(digests.items())
    assert {row["id"]: len(row["labels"]) for row in tags.to_pylist()} == {key: len(text) % 3 for key, text in texts.items()}
    assert sorted(rejects["reason"].to_pylist()) == sorted(bad.values())
    assert set(rejects["file"].to_pylist()) == {str(tmp_path / "in/b.jsonl.gz")}
    assert set(rejects["id"].to_pylist()) == {"1", "2", "3", "4", "5", "", None}
    assert 2 <= len(list(Path(out).glob("part-*"))) <= 3

    assert sink.summary == {
        "in": len(good) + len(bad),
        "tagged": len(good),
        "rejected": len(bad),
        "truncated": 10,
        "reasons": Counter(bad.values()),
        "labels": {"label0": 20, "label1": 10},
        "scores": [*[0] * 15, 10, *[0] * 3, 20],
    }
    assert list(sink.summary["reasons"].values()) == sorted(sink.summary["reasons"].values(), reverse=True)
    json.dumps(sink.summary)


def tagged(n: int, reason: str | None = None, **further: Any) -> pa.Table:
    columns = {"id": [f"{i}" for i in range(n)], "labels": [["a"]] * n, "scores": [[0.5]] * n, "model": ["m"] * n}
    columns |= {"text_digest": ["d"] * n, "file": ["f"] * n, "reason": pa.array([reason] * n, pa.string())}
    return pa.table(columns | further)


def test_a_write_task_that_dies_is_repeated_without_a_trace(tmp_path: Path, s3: S3, ray_session: None) -> None:
    class DyingOnce(TagSink):
        """Loses its worker after the files are there, but before Ray hears of it."""

        def write(self, blocks: Any, ctx: Any) -> Any:
            import os

            result = super().write(blocks, ctx)
            try:
                (tmp_path / f"died-{ctx.task_idx}").touch(exist_ok=False)
            except FileExistsError:
                return result
            os._exit(1)

    sink = DyingOnce(s3.uri("corpus/retried"))
    table = pa.concat_tables([tagged(5, names=[["A"]] * 5), tagged(2, "odd", names=[["A"]] * 2)])
    ray.data.from_arrow(table).write_datasink(sink)
    assert list(tmp_path.glob("died-*"))
    tags, rejects = read_parts(s3.uri("corpus/retried")), read_parts(s3.uri("corpus/retried/rejects"))
    assert tags.schema.remove_metadata() == pa.schema(sinks._TAGS)
    assert (len(tags), len(rejects)) == (5, 2)
    assert (sink.summary["in"], sink.summary["reasons"], sink.summary["labels"]) == (7, {"odd": 2}, {"a": 5})


# --- the sink alone


def context(task: int) -> Any:
    return SimpleNamespace(task_idx=task, kwargs={"write_uuid": "abc"})


def test_files_of_a_task_replace_those_of_its_first_attempt(tmp_path: Path) -> None:
    sink = TagSink(str(tmp_path))
    sink.write([tagged(3), tagged(4), tagged(0), tagged(2, "bad")], context(7))
    result = sink.write([tagged(5), tagged(1, "bad")], context(7))
    sink.write([tagged(1)], context(8))
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["part-abc-000007.parquet", "part-abc-000008.parquet", "rejects/part-abc-000007.parquet"]
    assert len(read_parts(str(tmp_path))) == 6
    assert (result["in"], result["tagged"], result["rejected"]) == (6, 5, 1)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be read or written.*part-abc-000000\.parquet"):
        TagSink(str(tmp_path / "file")).write([tagged(1)], context(0))


def test_the_summary_of_nothing(tmp_path: Path) -> None:
    sink = TagSink(str(tmp_path), sums=["truncated"])
    for returned in ([], [None], [sink.write([], context(0))]):
        sink.on_write_complete(SimpleNamespace(write_returns=returned))  # type: ignore[arg-type]
        assert sink.summary == dict.fromkeys(["in", "tagged", "rejected", "truncated"], 0) | {
            "reasons": {},
            "labels": {},
            "scores": [0] * 20,
        }
    assert not list(tmp_path.iterdir())

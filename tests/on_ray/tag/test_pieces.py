"""The steps of a piece: what is read, what is rejected and why, and what is done."""

import gc
import gzip
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, document, manifest_of, read_night, write

from xmc_ray import storage
from xmc_ray.data import line_ranges, reader
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.on_ray.tag.pieces import PieceCopier, PieceReader, PieceWriter, TagColumns, _Stream, finished
from xmc_ray.on_ray.tag.plan import Plan


def test_tags_are_cut_at_the_minimum_and_at_thresholds() -> None:
    labels = pa.table({"label": ["a", "b", "c"], "name": pa.array([None, "B", None], pa.string())})
    fixed = {"ids": [[0, 1, -1], [2, 0, 1]], "probabilities": [[0.9, 0.4, 0.0], [0.5, 0.3, 0.1]]}
    kinds = {"ids": pa.list_(pa.int64(), 3), "probabilities": pa.list_(pa.float32(), 3)}
    predicted = pa.table({"id": ["x", "y"], "text_digest": ["1", "2"]} | {n: pa.array(fixed[n], kinds[n]) for n in fixed})
    tags, summary = TagColumns(labels, "model", 0.2)(predicted)
    assert tags["labels"].to_pylist() == [["a", "b"], ["c", "a"]] and tags["names"].to_pylist() == [[None, "B"], [None, None]]
    assert summary["labels"] == [[0, 1, 2], [2, 1, 1], [1.2, 0.4, 0.5]] and summary["untagged"] == 0
    assert sum(summary["scores"]) == 4
    tags, summary = TagColumns(labels, "model", 0.0, np.array([0.95, 0.4, np.inf], np.float32))(predicted)
    assert tags["labels"].to_pylist() == [["b"], []] and summary["untagged"] == 1


def test_a_piece_that_was_cut_short_is_not_done(tmp_path: Path) -> None:
    labels = pa.table({"label": ["a"], "name": pa.array([None], pa.string())})
    empty = pa.table({name: pa.array([], kind) for name, kind in EMPTY.items()}, metadata={"made_by": json.dumps(MADE_BY)})
    write_pieces = PieceWriter(str(tmp_path), TagColumns(labels, "model", 0.0), MADE_BY)
    summaries = [write_pieces(number, empty) for number in range(3)]
    path = tmp_path / "pieces" / "t000001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "pieces" / ".t000003.parquet.part").write_bytes(b"")
    assert dict(finished(str(tmp_path))) == {"t000000": summaries[0], "t000002": summaries[2]}


MADE_BY = {"release": "0.1.0", "arithmetic": "cpu float32"}
EMPTY = {name: pa.string() for name in ("id", "file", "reason", "detail", "text_digest", "excerpt")}
EMPTY |= {"row": pa.int64(), "truncated": pa.int8(), "ids": pa.list_(pa.int64(), 1), "probabilities": pa.list_(pa.float32(), 1)}


def predicted(rows: int, k: int, made_by: dict[str, str]) -> pa.Table:
    """Good rows, as `Predictor` returns them, all with other labels."""
    values = {"ids": np.arange(rows * k), "probabilities": np.linspace(0, 1, rows * k).astype(np.float32)}
    lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(value), k) for name, value in values.items()}
    strings = {name: [str(n) for n in range(rows)] for name in ("id", "file", "text_digest", "excerpt")}
    nulls = {name: pa.nulls(rows, pa.string()) for name in ("reason", "detail")}
    columns = {**strings, **nulls, "row": np.arange(rows), "truncated": np.zeros(rows, np.int8), **lists}
    return pa.table(columns, metadata={"made_by": json.dumps(made_by)})


def test_a_summary_follows_from_the_file_whose_footer_does_not_grow(tmp_path: Path) -> None:
    """Kind: memory. The counts of labels are those of the file's own tags: one proof, and no JSON of a million entries."""
    labels = pa.table({"label": [f"label {n}" for n in range(30_000)], "name": pa.nulls(30_000, pa.string())})
    write_piece = PieceWriter(str(tmp_path), TagColumns(labels, "model", 0.25), MADE_BY)
    summary = write_piece(0, predicted(3_000, 10, MADE_BY))
    assert len(summary["labels"][0]) == 22_500 and summary["untagged"] == 750
    assert dict(finished(str(tmp_path))) == {"t000000": summary}
    footer = pq.read_metadata(tmp_path / "pieces" / "t000000.parquet").metadata
    assert len(footer[b"xmc_ray"]) < 2_000


@pytest.mark.parametrize("name", MADE_BY)
def test_a_piece_that_was_computed_in_another_way_is_not_written(name: str, tmp_path: Path) -> None:
    """Kind: a night's identity holds to the end. As by a node with a GPU, or with another release, in the middle of it."""
    labels = pa.table({"label": ["a", "b"], "name": pa.nulls(2, pa.string())})
    write_piece = PieceWriter(str(tmp_path), TagColumns(labels, "model", 0.0), MADE_BY)
    for made_by in (MADE_BY | {name: "another"}, {}):
        with pytest.raises(ModelError, match=r"^a piece was computed in another way than its night: t000000; found "):
            write_piece(0, predicted(1, 2, made_by))
    assert not list(tmp_path.iterdir())


def test_a_night_before_that_changes_is_not_copied(tmp_path: Path) -> None:
    """Kind: check, then use. Which of its rows are reused goes by their number in a file."""
    labels = pa.table({"label": ["a"], "name": pa.nulls(1, pa.string())})
    columns = TagColumns(labels, "model", 0.0)
    tags = [{"id": f"{n}", "labels": ["a"], "scores": [0.5], "model": "model", "text_digest": f"{n}"} for n in range(3)]
    path, work = tmp_path / "part.parquet", str(tmp_path / "work")
    pq.write_table(pa.Table.from_pylist(tags, columns.schema), path)
    file = storage.stat(path)
    piece = {**vars(file), "number": 0, "rows": 2, "keep": np.packbits([True, False, True]).tobytes()}
    copy = PieceCopier(work, columns, MADE_BY)
    summary = copy(piece)
    assert dict(finished(work)) == {"r000000": summary} and summary["labels"] == [[0], [2], [1.0]] and summary["reused"] == 2
    pq.write_table(pa.Table.from_pylist([*tags, *tags], columns.schema), path)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^the night before has changed since .*: {path}; remove {work} and run again"):
            copy(piece)
        path.unlink(missing_ok=True)


def test_what_cannot_be_read_is_rejected_with_its_place(tag: Callable[..., str], tmp_path: Path) -> None:
    """Files cut short, of another schema, of garbage; bytes that are no text; a text of 100 MB; ids that come twice."""
    folder = tmp_path / "in"
    good = [document(n) for n in range(40)]
    write(folder / "a.parquet", [*good[:20], {"id": "d5", "text": "a red plum"}, {"id": "huge", "text": "a" * 100_000_000}])
    write(folder / "b.parquet", [{"id": f"x{n}", "title": "none of ours"} for n in range(3)])
    (folder / "c.parquet").write_bytes((folder / "a.parquet").read_bytes()[:300])
    (folder / "d.parquet").write_bytes(b"")
    latin = pa.array([b"a", b"\xe4", None]).view(pa.string())
    pq.write_table(pa.table({"id": latin, "text": ["a red apple"] * 3}), folder / "e.parquet")
    write(folder / "f.parquet", good[20:])
    damaged = bytearray((folder / "f.parquet").read_bytes())
    damaged[4:40] = bytes(36)  # the first row group's first page
    (folder / "g.parquet").write_bytes(bytes(damaged))
    write(folder / "h.parquet", [{"id": "d0", "text": None}, {"id": "d5", "text": "again"}])
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), folder / "i.parquet")

    with pytest.raises(DataError, match=r"too many documents are rejected: \S+; found 20\.8%: duplicate id \(15\), such as"):
        tag(folder)
    with pytest.raises(DataError, match=r"too many documents are rejected: \S+/_work/rejects; found .*expected at most 30\.0%"):
        tag(folder, max_reject_share=0.3)
    made = tmp_path / "out" / "_nights" / "dt=2026-11-23"
    assert not (made / "_SUCCESS").exists() and list((made / "_work" / "rejects").glob("*.parquet"))
    tags, rejects = read_night(tag(folder, max_reject_share=1))
    assert Counter(tags["id"].to_pylist()) == Counter([*(row["id"] for row in good), "a"])
    found = [(Path(row["file"]).name, *list(row.values())[1:]) for row in rejects.to_pylist()]
    a = str(folder / "a.parquet")
    assert found[:2] == [
        ("a.parquet", 20, "d5", "duplicate id", f"first at {a} row 5"),
        ("a.parquet", 21, "huge", "text is too long", "more than 1,048,576 bytes"),
    ]
    assert found[2:5] == [("b.parquet", n, f"x{n}", "text is null", None) for n in range(3)]
    assert [row[:3] for row in found[5:7]] == [("c.parquet", 0, None), ("d.parquet", 0, None)]
    assert all(row[3] == "cannot be read" and row[4] for row in found[5:7])
    assert found[7:9] == [("e.parquet", 1, None, "id is not UTF-8", None), ("e.parquet", 2, None, "id is null", None)]
    of_g = [row for row in found if row[0] == "g.parquet"]
    assert len(of_g) == 20 and [row[1] for row in of_g] == list(range(20))
    assert all(row[3] == "cannot be read" and row[4] for row in of_g[:7])
    f = str(folder / "f.parquet")
    assert [row[3:] for row in of_g[7:]] == [("duplicate id", f"first at {f} row {n}") for n in range(7, 20)]
    assert found[-2:] == [
        ("h.parquet", 0, "d0", "text is null", None),
        ("h.parquet", 1, "d5", "duplicate id", f"first at {a} row 5"),
    ]
    manifest = manifest_of(str(made))
    assert manifest["in"] == manifest["tagged"] + manifest["rejected"] == 41 + len(found)
    assert manifest["reasons"] == Counter(row[3] for row in found), "counted by reason, whatever the details"
    assert manifest["reasons"]["duplicate id"] == 15 and manifest["reasons"]["text is null"] == 4


def test_ids_of_file_and_row(tag: Callable[..., str], tmp_path: Path) -> None:
    lines = [json.dumps({"text": document(n)["text"]}) for n in range(6)]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text("\n\n".join(lines[:3]))
    (tmp_path / "in" / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[3:5], "{", lines[5]]).encode()))
    tags, rejects = read_night(tag(tmp_path / "in", "--documents.id=null", max_reject_share=0.2, pool__max=0))
    assert tags["id"].to_pylist() == [
        "a.jsonl:0",
        "a.jsonl:1",
        "a.jsonl:2",
        "sub/b.jsonl.gz:0",
        "sub/b.jsonl.gz:1",
        "sub/b.jsonl.gz:3",
    ]
    assert rejects.select(["row", "id"]).to_pylist() == [{"row": 2, "id": "sub/b.jsonl.gz:2"}]


def test_files_that_go_or_change_after_they_were_listed(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("a", 0), ("b", 10), ("c", 20)):
        write(tmp_path / "in" / f"{name}.parquet", [document(n) for n in range(first, first + 10)])
    save = Plan.save

    def meddle(self: Plan, work: str) -> None:
        save(self, work)
        (tmp_path / "in" / "a.parquet").unlink()
        write(tmp_path / "in" / "b.parquet", [document(n) for n in range(50, 55)])

    monkeypatch.setattr(Plan, "save", meddle)
    tags, rejects = read_night(tag(tmp_path / "in", max_reject_share=1))
    assert tags["id"].to_pylist() == [f"d{n}" for n in range(20, 30)]
    found = Counter((Path(row["file"]).name, row["reason"]) for row in rejects.to_pylist())
    assert found == {
        ("a.parquet", "the file has disappeared"): 10,
        ("b.parquet", "the file has changed since it was listed"): 10,
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_no_piece_has_rows_of_two_versions_of_a_file(
    kind: str, tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: check, then use. The file changes while pieces are read from it, several in one go; those before are kept."""
    path = tmp_path / "in" / f"a.{kind}"

    def fill(first: int) -> None:
        rows = [document(n) for n in range(first, first + 4000)]
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2000)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    tokenised = PieceReader._tokenised

    def meddle(self: PieceReader, table: pa.Table) -> pa.Table:
        if table["row"][0].as_py() == 1024:
            fill(10_000)
        return tokenised(self, table)

    fill(0)
    with monkeypatch.context() as patch:
        patch.setattr(PieceReader, "_tokenised", meddle)
        with pytest.raises(DataError, match=rf"^a file has changed while it was read: {path}; .*--overwrite"):
            tag(path, commit_rows=1000)
    work = tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_work"
    pieces = [pq.read_table(piece) for piece in sorted((work / "pieces").iterdir())]
    assert pa.concat_tables(pieces)["id"].to_pylist() == [f"d{n}" for n in range(1000)]
    with pytest.raises(ConfigError, match=r"another run.*found input.*--overwrite"):
        tag(path, commit_rows=1000)
    tags, rejects = read_night(tag(path, "--overwrite", commit_rows=1000))
    assert sorted(tags["id"].to_pylist()) == sorted(f"d{n}" for n in range(10_000, 14_000)) and not len(rejects)


def test_a_stream_that_is_left_early_closes_at_once(tmp_path: Path) -> None:
    """Kind: a job that hangs. In a cycle of references it would wait for its threads in whatever thread collects it."""
    path = write(tmp_path / "a.parquet", [document(n) for n in range(10)])
    segment = {**vars(storage.stat(path)), "start": 0, "row": 0, "rows": 10, "reason": None}
    stream = _Stream([segment], Rules.of(DocumentsConfig(uri=str(path)), labelled=False))
    next(stream.take(1))
    chunks = weakref.ref(stream._chunks)
    gc.disable()
    try:
        del stream
        assert chunks() is None
    finally:
        gc.enable()


def test_a_file_that_changes_while_the_night_is_planned_ends_it(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: check, then use. There is no plan of two versions."""
    path = write(tmp_path / "in" / "a.parquet", [document(n) for n in range(3000)])
    parquet = reader._parquet

    def meddle(*arguments: Any) -> Any:
        for part in parquet(*arguments):
            yield part
            write(path, [document(n) for n in range(10_000, 13_000)])

    monkeypatch.setattr(reader, "_parquet", meddle)
    with pytest.raises(DataError, match="has changed while it was read"):
        tag(path)
    assert not (tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_work" / "plan.json").exists()


def test_what_is_left_out_of_the_input_is_in_log_manifest_and_report(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind of fault: what counts as input is decided in two places, and what is passed over is not told."""
    folder = tmp_path / "in"
    write(folder / "a.parquet", [document(n) for n in range(5)])
    for name in ("b.csv", "c.csv", "_SUCCESS", ".a.parquet.crc"):
        (folder / name).touch()
    night = tag(folder)
    left_out = {".csv": {"files": 2, "example": f"{folder}/b.csv"}}
    assert manifest_of(night)["left_out"] == left_out
    assert f"left out: 2 *.csv, such as {folder}/b.csv\n" in capsys.readouterr().out
    page = Path(night, "report.html").read_text()
    assert "Left out of the input, unread: 2 files (.csv), such as" in page and f"{folder}/b.csv" in page


def test_a_large_packed_file_is_told_at_the_start(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: cost. It is the only file that a night reads many times over."""
    monkeypatch.setattr(line_ranges, "LARGE", 50)
    path = tmp_path / "in" / "a.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress("".join(json.dumps(document(n)) + "\n" for n in range(50)).encode()))
    night = tag(path.parent)
    first, _ = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("cannot be split, since packed: 1 files of more than 0 MiB, the largest") and str(path) in first
    assert manifest_of(night)["tagged"] == 50


def hierarchy_table(path: Path, **columns: Any) -> Path:
    rows = {"label": [*COLOURS, "colour", *KINDS], "parent": ["colour"] * 3 + ["property"] + ["fruit"] * 4}
    pq.write_table(pa.table(rows | columns), path)
    return path


def test_a_night_is_closed_upwards_by_labels_that_the_bundle_does_not_know(tag: Callable[..., str], tmp_path: Path) -> None:
    """They count in the night, in its report and for the next one, which reuses them."""
    names = ["Rot", None, None, "Colour", None, None, None, None]
    given = {"hierarchy__table": hierarchy_table(tmp_path / "h.parquet", name=names), "hierarchy__close": True, "k": 2}
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(24)])
    plain = manifest_of(tag(catalogue, output=tmp_path / "plain", k=2))
    folder = tag(catalogue, **given)
    manifest, (tags, _) = manifest_of(folder), read_night(folder)
    below = dict(zip(["colour", "property", "fruit"], [COLOURS, [*COLOURS, "colour"], KINDS], strict=True))
    for row in tags.to_pylist():
        scores = dict(zip(row["labels"], row["scores"], strict=True))
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(scores) == len(row["labels"])
        for label, narrower in below.items():
            tagged = [scores[other] for other in narrower if other in scores]
            assert (label in scores) >= bool(tagged) and all(scores[label] >= score for score in tagged)
        named = dict(zip(row["labels"], row["names"], strict=True))
        assert named.get("colour", "Colour") == "Colour" and named.get("red", "RED") == "RED"
    counts = Counter(label for row in tags["labels"].to_pylist() for label in row)
    assert manifest["labels"] == counts and manifest["distinct_labels"] == len(counts)
    assert counts["property"] == counts["colour"] > 0
    table = pq.read_table(Path(folder, "label-counts.parquet")).to_pydict()
    assert dict(zip(table["label"], table["documents"], strict=True)) == {**dict.fromkeys(table["label"], 0), **counts}
    assert "property" in Path(folder, "report.html").read_text() and len(manifest["hierarchy"]) == 16
    assert "hierarchy" not in plain and plain["config"]["hierarchy"] is None
    again = tag(catalogue, date="2026-11-24", previous="last", **given)
    assert manifest_of(again)["reused"] == 24 and manifest_of(again)["labels"] == counts
    assert manifest_of(again)["changes_since"]["changed"] == 0


def test_another_hierarchy_is_another_night(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what it says: a copy elsewhere is the same one."""
    table = hierarchy_table(tmp_path / "h.parquet")
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(12)])
    given = {"hierarchy__close": True}
    folder = tag(catalogue, hierarchy__table=table, **given)
    said = capsys.readouterr().out
    assert "hierarchy: 2 parents have no row of their own, such as 'fruit'" in said
    copy = Path(shutil.copy(table, tmp_path / "copy.parquet"))
    assert tag(catalogue, hierarchy__table=copy, **given) == folder and "nothing to do" in capsys.readouterr().out
    other = hierarchy_table(tmp_path / "other.parquet", parent=[None] * 4 + ["fruit"] * 4)
    with pytest.raises(
        ConfigError, match=r"the folder of the day holds another run: .*; found hierarchy = '\w{16}' instead of"
    ):
        tag(catalogue, hierarchy__table=other, **given)
    with pytest.raises(ConfigError, match=r"hierarchy = .* instead of None"):
        tag(catalogue)
    with pytest.raises(ConfigError, match=r"found hierarchy\.specific = 'off' instead of 'first'"):
        tag(catalogue, hierarchy__table=table, hierarchy__specific="first", **given)
    for day, settings, reused in (
        (24, {"hierarchy__table": copy, **given}, 12),
        (25, {"hierarchy__table": other, **given}, 0),
        (26, {}, 0),
    ):
        assert manifest_of(tag(catalogue, previous=folder, date=f"2026-11-{day}", **settings))["reused"] == reused
        said = capsys.readouterr().out
        assert ("\nnothing is reused: the night before had another hierarchy: " in f"\n{said}") == (reused == 0)


def test_a_hierarchy_that_cannot_be_used_is_told_before_anything_is_written(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(0)])
    table = hierarchy_table(tmp_path / "h.parquet", label=list("abcdefgh"), parent=list("bcdaefgh"))
    with pytest.raises(DataError, match="the hierarchy has a cycle"):
        tag(catalogue, hierarchy__table=table, hierarchy__close=True)
    pq.write_table(pa.table({"label": ["a"], "parent": ["b"]}), table)
    with pytest.raises(DataError, match="the hierarchy has none of the bundle's labels"):
        tag(catalogue, hierarchy__table=table, hierarchy__close=True)
    with pytest.raises(ConfigError, match=r"a hierarchy that changes no tag"):
        tag(catalogue, hierarchy__table=table)
    assert not (tmp_path / "out" / "tags").exists()

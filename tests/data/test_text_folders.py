"""Corpora of texts in folders, and Annif's files of short texts, become documents of Parquet by the convert job."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from xmc_ray.data.convert import ConvertConfig, run
from xmc_ray.data.text_folders import read_annif_folder
from xmc_ray.errors import ConfigError, DataError

SKOS = """@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix : <http://example.org/> .
:red a skos:Concept ; skos:prefLabel "red"@en . :blue a skos:Concept ; skos:prefLabel "blue"@en, "blau"@de .
"""
RED, BLUE = "http://example.org/red", "http://example.org/blue"


def converted(tmp_path: Path, **further: Any) -> list[dict[str, Any]]:
    run(ConvertConfig(output=str(tmp_path / "out" / "x.parquet"), overwrite=True, **further))
    return pq.read_table(tmp_path / "out" / "x.parquet").to_pylist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts: one with subjects, one below it with names, one with neither; and a vocabulary beside the folder."""
    (tmp_path / "vocabulary.ttl").write_text(SKOS)
    corpus = tmp_path / "corpus"
    (corpus / "more").mkdir(parents=True)
    (corpus / "a.txt").write_bytes(b"\xef\xbb\xbfa red\nsunset")
    (corpus / "a.tsv").write_text(f"<{RED}>\tred\n<{BLUE}>\tblue\n")
    (corpus / "more" / "b.txt").write_text("deep sea")
    (corpus / "more" / "b.key").write_text("blue\nblue\n")
    (corpus / "c.txt").write_text("nothing")
    return corpus


def test_annif_folders_have_subjects_names_or_neither(folder: Path, tmp_path: Path) -> None:
    found = converted(tmp_path, layout="annif", documents=str(folder), names=str(tmp_path / "vocabulary.ttl"), rows=2)
    assert found == [
        {"id": "a", "text": "a red\nsunset", "labels": [RED, BLUE]},
        {"id": "c", "text": "nothing", "labels": []},
        {"id": "more/b", "text": "deep sea", "labels": [BLUE]},
    ]
    without = converted(tmp_path, layout="annif", documents=str(folder))
    assert without[2]["labels"] == ["blue"]
    (folder / "c.key").write_text("green\n")
    with pytest.raises(DataError, match=r"a label without a name.*found green; expected one in .*vocabulary\.ttl"):
        converted(tmp_path, layout="annif", documents=str(folder), names=str(tmp_path / "vocabulary.ttl"))


def test_only_a_newline_ends_a_name(tmp_path: Path) -> None:
    lines = {"a.tsv": "<u:1>\tfirst\u2028second\n<u:2>\tsome\x85thing\r\n", "b.key": "one\u2028name\n\nother\r\n"}
    for name, content in lines.items():
        (tmp_path / name).write_text(content, newline="")
        (tmp_path / name).with_suffix(".txt").write_text("text")
    found = [row["labels"] for table in read_annif_folder(str(tmp_path), rows=9) for row in table.to_pylist()]
    assert found == [["u:1", "u:2"], ["one\u2028name", "other"]]


def test_annif_short_texts_and_names_of_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(f"A red sunset\t<{RED}> <{BLUE}>\nDeep sea\t{BLUE}\n".encode()))
    (tmp_path / "vocabulary.tsv").write_text(f"<{RED}>\tred\n<{BLUE}>\tblue\n")
    further = {"names": str(tmp_path / "vocabulary.tsv"), "names_output": str(tmp_path / "out" / "names.parquet")}
    found = converted(tmp_path, layout="annif", documents=str(tmp_path / "x.tsv.gz"), **further)
    assert [(row["id"], row["text"], row["labels"]) for row in found] == [
        ("1", "A red sunset", [RED, BLUE]),
        ("2", "Deep sea", [BLUE]),
    ]
    assert pq.read_table(tmp_path / "out" / "names.parquet").to_pylist() == [
        {"label": RED, "name": "red"},
        {"label": BLUE, "name": "blue"},
    ]
    (tmp_path / "y.tsv").write_text(f"no subject\nx\t{RED}\n")
    with pytest.raises(DataError, match=r"wrong number of columns: .*y\.tsv:1; found 1; expected text tab subjects"):
        converted(tmp_path, layout="annif", documents=str(tmp_path / "y.tsv"))


def test_a_file_of_texts_of_any_name_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "titles.txt").write_text(f"A red sunset\t<{RED}> <{BLUE}>\nDeep sea\t{BLUE}\n")
    found = converted(tmp_path, layout="annif", documents=str(tmp_path / "titles.txt"))
    assert [(row["text"], row["labels"]) for row in found] == [("A red sunset", [RED, BLUE]), ("Deep sea", [BLUE])]


def test_names_in_another_language(tmp_path: Path, folder: Path) -> None:
    further = {"names": str(tmp_path / "vocabulary.ttl"), "names_output": str(tmp_path / "out" / "names.parquet")}
    (folder / "more" / "b.key").write_text("blau\n")
    found = converted(tmp_path, layout="annif", documents=str(folder), language="de", **further)
    assert found[2]["labels"] == [BLUE]
    assert {row["label"]: row["name"] for row in pq.read_table(tmp_path / "out" / "names.parquet").to_pylist()} == {
        RED: None,
        BLUE: "blau",
    }


def test_texts_with_a_table_of_labels(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,labels\na.txt,red|blue\nmore/b,blue\na.txt,green\n")
    found = converted(tmp_path, layout="texts", documents=str(folder), labels=str(table), separator="|")
    assert [(row["id"], row["labels"]) for row in found] == [("a", ["red", "blue", "green"]), ("c", []), ("more/b", ["blue"])]
    table.write_text("file,labels\nz.txt,red\n")
    with pytest.raises(DataError, match=r"a file of the table is not there: .*labels\.csv; found z\.txt"):
        converted(tmp_path, layout="texts", documents=str(folder), labels=str(table))


def test_what_is_no_corpus_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.doc").touch()
    with pytest.raises(DataError, match=r"no texts: .*empty; found 1 other files; expected \*\.txt"):
        converted(tmp_path, layout="annif", documents=str(tmp_path / "empty"))
    (folder / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"not UTF-8: .*c\.txt; found byte 3; way out: convert the file|not UTF-8.*byte 3"):
        converted(tmp_path, layout="annif", documents=str(folder))
    for further, words in (
        ({"layout": "texts"}, "labels are required with layout lines or texts"),
        ({"layout": "annif", "separator": ";"}, "invalid value of separator"),
    ):
        with pytest.raises(ConfigError, match=words):
            converted(tmp_path, documents=str(folder), **further)

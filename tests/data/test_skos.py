"""SKOS as a table: in each format the same, and no file reaches beyond itself or grows beyond its size."""

import builtins
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from seaweed import S3

from xmc_ray import storage
from xmc_ray.data.hierarchy import Hierarchy
from xmc_ray.data.skos import read_skos
from xmc_ray.errors import ConfigError, DataError

TURTLE = """
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix : <http://example.org/> .
:red a skos:Concept ; skos:broader :colour ; skos:prefLabel "rot"@de, "red"@en ; skos:notation "C1" .
:colour skos:narrower :red, :blue ; skos:prefLabel "Farbe"@de, "colour" ; skos:notation "C" ; skos:related :paint .
:blue skos:prefLabel "blau"@de ; skos:notation "C2" .
:alone a skos:Concept ; skos:prefLabel "alone"@en ; skos:notation "X" .
"""
RDF = '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:skos="http://www.w3.org/2004/02/skos/core#">'
XML = f"""<?xml version="1.0"?>
{RDF}<skos:Concept rdf:about="http://example.org/red"><skos:broader rdf:resource="http://example.org/colour"/>
<skos:prefLabel xml:lang="en">red</skos:prefLabel></skos:Concept></rdf:RDF>"""
TRIPLE = "<http://example.org/red> <http://www.w3.org/2004/02/skos/core#broader> <http://example.org/colour> .\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_concepts_become_rows(tmp_path: Path) -> None:
    uri = write(tmp_path / "h.ttl", TURTLE)
    assert read_skos(uri).to_pylist() == [
        {"label": "http://example.org/alone", "parent": [], "name": "alone"},
        {"label": "http://example.org/blue", "parent": ["http://example.org/colour"], "name": None},
        {"label": "http://example.org/colour", "parent": [], "name": "colour"},
        {"label": "http://example.org/red", "parent": ["http://example.org/colour"], "name": "red"},
    ]
    assert read_skos(uri, "notation")["parent"].to_pylist() == [[], ["C"], [], ["C"]]
    assert read_skos(uri, language="de")["name"].to_pylist() == [None, "blau", "Farbe", "rot"]
    hierarchy = Hierarchy.read(uri)
    assert hierarchy.level.tolist() == [0, 1, 0, 1] and not len(hierarchy.orphans)


def test_formats_say_the_same(tmp_path: Path, s3: S3) -> None:
    turtle = "<http://example.org/red> <http://www.w3.org/2004/02/skos/core#broader> <http://example.org/colour>"
    plain = read_skos(write(tmp_path / "h.nt", TRIPLE))
    assert read_skos(write(tmp_path / "h.ttl", turtle + " .")) == plain
    assert read_skos(write(tmp_path / "h.rdf", XML)).drop_columns(["name"]) == plain.drop_columns(["name"])
    storage.write_bytes(s3.uri("skos/h.nt"), TRIPLE.encode())
    assert read_skos(s3.uri("skos/h.nt")) == plain


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.ttl", "<a> <b> ", r"^cannot be read as RDF \(turtle\): \S+/h\.ttl; found "),
        ("h.ttl", "<a> <b> " + "[ <p> " * 9000, r"^cannot be read as RDF \(turtle\): "),
        ("h.nt", "no triple\n", r"^cannot be read as RDF \(nt\): "),
        ("h.rdf", XML[:300], r"^cannot be read as RDF \(xml\): "),
        ("h.rdf", "", r"^cannot be read as RDF \(xml\): "),
        ("h.ttl", "", "^the hierarchy is empty: "),
        ("h.ttl", TRIPLE.replace("<http://example.org/red>", "_:b"), r"^a concept needs one iri: \S+: \S+/h\.ttl; found none$"),
        (
            "h.ttl",
            TURTLE + ':alone skos:prefLabel "lonely"@en .',
            r"one prefLabel: http://example\.org/alone: \S+; found 'alone' and 'lonely'",
        ),
        ("h.ttl", TRIPLE + TRIPLE.replace("red>", "x>").replace("colour", "red").replace("x>", "colour>"), "has a cycle: "),
    ],
)
def test_a_bad_file_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as refused:
        Hierarchy.read(write(tmp_path / name, text))
    assert "\n" not in str(refused.value)


def test_a_concept_needs_its_key(tmp_path: Path) -> None:
    uri = write(tmp_path / "h.ttl", TURTLE)
    with pytest.raises(DataError, match=r"^a concept needs one name: http://example\.org/blue: .*; found none"):
        read_skos(uri, "name")
    with pytest.raises(DataError, match=r"^a concept needs one notation: "):
        read_skos(write(tmp_path / "h.nt", TRIPLE), "notation")
    with pytest.raises(ConfigError, match=r"not a name of RDF that is read: .*; expected \.ttl or \.nt or "):
        read_skos(write(tmp_path / "h.jsonld", "{}"))
    with pytest.raises(DataError, match="no such file"):
        read_skos(tmp_path / "none.ttl")


@pytest.fixture
def visitors() -> Any:
    """Requests that a local web server gets, and its address."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield paths, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_is_fetched_and_nothing_expanded(tmp_path: Path, visitors: tuple[list[str], str]) -> None:
    """Kind: XML that makes its reader a client, or fills its memory. Of an outer document type only the name is read."""
    paths, address = visitors
    secret = write(tmp_path / "secret", "do not read")
    body = XML.partition("?>")[2].replace(">red<", ">&e;<")
    bomb = '<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {x} "{f"&{y};" * 10}">' for y, x in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for entities in (bomb, f'<!ENTITY e SYSTEM "file://{secret}">', f'<!ENTITY % e SYSTEM "{address}/dtd"> %e;'):
        with pytest.raises(DataError, match=r"found a declaration of the entity '[ae]', which is not expanded"):
            read_skos(write(tmp_path / "h.rdf", f"<!DOCTYPE rdf:RDF [{entities}]>{body}"))
    outer = f'<!DOCTYPE rdf:RDF SYSTEM "{address}/outer.dtd">' + XML.partition("?>")[2]
    assert len(read_skos(write(tmp_path / "h.rdf", outer))) == 2
    imports = f"<{address}/x> <http://www.w3.org/2002/07/owl#imports> <{address}/imported.ttl> .\n@base <{address}/> .\n"
    assert len(read_skos(write(tmp_path / "h.ttl", imports + TURTLE))) == 4
    assert paths == []


def test_relative_iris_do_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<red> <http://www.w3.org/2004/02/skos/core#broader> <colour> ."
    uri, found = write(tmp_path / "h.ttl", text), []
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        found.append(read_skos(uri)["label"].to_pylist())
    assert found == [["file:///colour", "file:///red"]] * 2


def test_rdflib_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == "rdflib":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match=r"^SKOS needs rdflib: .*; pip install 'xmc_ray\[skos\]'$"):
        read_skos(write(tmp_path / "h.ttl", TURTLE))

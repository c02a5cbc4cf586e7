"""Hierarchies out of SKOS (https://www.w3.org/TR/skos-reference/), by rdflib: the optional dependency ``xmc_ray[skos]``.

One file is read, and nothing else: no import, no remote context or entity (so no JSON-LD), and of RDF/XML no entity at all,
since a few lines of them expand to gigabytes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal
from xml.parsers import expat

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rdflib import Graph

Key = Literal["iri", "notation", "name"]

FORMATS = {".ttl": "turtle", ".nt": "nt", ".rdf": "xml", ".xml": "xml", ".owl": "xml"}
"""The ends of names, and what rdflib calls their formats."""

_BASE = "file:///"  # of relative IRIs: else it would be the working folder
_SCHEMA = pa.schema([("label", pa.string()), ("parent", pa.list_(pa.string())), ("name", pa.string())])


def read_skos(uri: storage.Uri, key: Key = "iri", language: str = "en") -> pa.Table:
    """``label``, ``parent`` (list) and ``name`` of all concepts of a file: what is a ``Concept``, or broader or narrower.

    ``key`` says what becomes the label. A name is the ``prefLabel`` in ``language``, else the one without a language.
    Raises ConfigError without rdflib or for another kind of file, DataError for one that cannot be read, and for a concept
    without such a key or with several.
    """
    graph = _parse(str(uri))
    from rdflib.namespace import RDF, SKOS

    pairs = {*graph.subject_objects(SKOS.broader), *((child, parent) for parent, child in graph.subject_objects(SKOS.narrower))}
    concepts = sorted({*graph.subjects(RDF.type, SKOS.Concept), *(concept for pair in pairs for concept in pair)}, key=str)
    names: dict[Any, str | None] = {concept: _name(graph, concept, language, str(uri)) for concept in concepts}
    keys = {concept: _key(graph, concept, key, names[concept], str(uri)) for concept in concepts}
    parents: dict[Any, list[str]] = {concept: [] for concept in concepts}
    for child, parent in pairs:
        parents[child].append(keys[parent])
    rows = [{"label": keys[concept], "parent": parents[concept], "name": names[concept]} for concept in concepts]
    return pa.Table.from_pylist(rows, _SCHEMA)


def _parse(uri: str) -> "Graph":
    try:
        from rdflib import Graph
    except ImportError:
        raise ConfigError("SKOS needs rdflib", where=uri, way_out="pip install 'xmc_ray[skos]'") from None
    kind = next((kind for end, kind in FORMATS.items() if uri.endswith(end)), None)
    if kind is None:
        raise ConfigError("not a name of RDF that is read", where=uri, expected=" or ".join(FORMATS))
    data = storage.patiently(storage.read_bytes, uri)
    try:
        if kind == "xml":
            _check_entities(data)
        with _without_warnings():
            return Graph().parse(data=data, format=kind, publicID=_BASE)
    except Exception as error:  # of many kinds, by parser
        found = str(error).strip() or type(error).__name__
        raise DataError(f"cannot be read as RDF ({kind})", where=uri, found=f"{found:.200}") from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """rdflib warns of every odd IRI, and of every literal that is not of its type with a traceback."""
    logger = logging.getLogger("rdflib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_entities(data: bytes) -> None:
    """ValueError for a declaration of an entity; they can stand before the root alone, and nothing else is read."""

    def refuse(name: str, *_: object) -> None:
        raise ValueError(f"a declaration of the entity {name!r}, which is not expanded: convert the file to Turtle")

    class Root(Exception): ...

    def stop(*_: object) -> None:
        raise Root

    parser = expat.ParserCreate()
    parser.EntityDeclHandler, parser.StartElementHandler = refuse, stop
    with suppress(Root):
        parser.Parse(data, True)


def _name(graph: "Graph", concept: Any, language: str, where: str) -> str | None:
    from rdflib.namespace import SKOS

    by_language: dict[str | None, list[str]] = {}
    for literal in graph.objects(concept, SKOS.prefLabel):
        by_language.setdefault(getattr(literal, "language", None), []).append(str(literal).strip())
    named = by_language.get(language) or by_language.get(None) or []
    return _only(named, "prefLabel", concept, where) if named else None


def _key(graph: "Graph", concept: Any, key: Key, name: str | None, where: str) -> str:
    from rdflib import URIRef
    from rdflib.namespace import SKOS

    found = {
        "iri": [str(concept)] if isinstance(concept, URIRef) else [],
        "notation": [str(literal).strip() for literal in graph.objects(concept, SKOS.notation)],
        "name": [name] if name else [],
    }[key]
    return _only(found, key, concept, where)


def _only(values: list[str], what: str, concept: object, where: str) -> str:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        found = " and ".join(map(repr, distinct[:2])) or "none"
        raise DataError(f"a concept needs one {what}: {concept}", where=where, found=found)
    return distinct[0]

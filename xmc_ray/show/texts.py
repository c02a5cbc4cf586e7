"""Texts of documents, which a night does not keep: looked up in its catalogue, if that still lies where it was read."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.bundle import folder
from xmc_ray.data import fields
from xmc_ray.data.documents import DocumentsConfig, Rules, text_digest
from xmc_ray.data.reader import Segment, read_file
from xmc_ray.errors import XmcError
from xmc_ray.storage.listing import FileInfo

_ROWS = 8192  # of a chunk


class Text(NamedTuple):
    """A document's text as a bundle reads it, with marks between fields, and the digest that a night notes of it.

    Without a digest it is not known how the bundle reads it.
    """

    text: str
    digest: str | None

    @property
    def readable(self) -> str:
        """For people: fields on lines of their own."""
        return str(fields.readable(pa.array([self.text]))[0])


class Texts(NamedTuple):
    """Those that were found, by id, and why others were not: empty if all were."""

    found: dict[str, Text]
    note: str = ""


def look_up(manifest: Mapping[str, Any], ids: Sequence[str], seconds: float) -> Texts:
    """The texts of documents with these ``ids``, looked for in the catalogue for at most ``seconds``; raises for none."""
    deadline, found, left = time.monotonic() + seconds, dict[str, Text](), dict.fromkeys(ids)
    note = "The catalogue does not have all of these documents any more."
    try:
        documents, is_certain = _documents(manifest)
        files = [FileInfo(**file) for file in manifest["input"]]
        rules = Rules.of(documents, labelled=False)
        for chunk in (chunk for file in files for chunk in read_file(Segment(file), rules, _ROWS)):
            if chunk.reject is not None:  # of one file: others may have the documents
                note = f"The catalogue is not as the night has read it: {chunk.reject}."
            here = chunk.table.filter(pc.is_in(chunk.table["id"], value_set=pa.array([*left], pa.string())))
            here = here.filter(pc.is_null(here["reason"]))
            columns = (here["id"], here["text"], text_digest(here["text"].combine_chunks()))
            for id, text, digest in zip(*(column.to_pylist() for column in columns), strict=True):
                found.setdefault(id, Text(text, digest if is_certain else None))
                left.pop(id, None)
            if not left:
                return Texts(found)
            if time.monotonic() > deadline:
                return Texts(found, f"Not all texts were found in the catalogue within {seconds:g} seconds.")
    except XmcError as error:
        return Texts(found, f"The catalogue cannot be read: {error}.")
    except (KeyError, TypeError, ValueError):
        return Texts(found, "The manifest does not say where the catalogue is: another version of xmc_ray may have written it.")
    return Texts(found, note)


def _documents(manifest: Mapping[str, Any]) -> tuple[DocumentsConfig, bool]:
    """How the night has read its catalogue, and whether that is certain: whether several columns are fields is said by its
    bundle, which may have gone."""
    known = DocumentsConfig(**manifest["config"]["documents"])
    if len(known.text) == 1:
        return known, True
    bundles = manifest["config"]["bundle"]
    first = bundles if isinstance(bundles, str) else bundles[0]
    try:
        settings = folder.read_settings(first)
    except XmcError:
        return known, False
    return known.with_fields(fields.names_of(folder.fields_of(settings))), True

"""Files of Arrow's IPC stream, as Hugging Face datasets saves a split, or of its file format: read forward, batch by batch.

Labels of type ``ClassLabel`` are numbers there, with their names in the schema; they are read as these names.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.labels import lists_from_rows
from xmc_ray.data.strings import is_list, plain

_MAGIC = b"ARROW1"  # of the file format; a stream has none
_FEATURES = b"huggingface"  # metadata of the schema


def arrow_columns(uri: str) -> list[tuple[str, pa.DataType]]:
    """The columns of a file and their types, none if it has no rows; pyarrow's errors as they are."""
    with _opened(uri) as (schema, batches):
        has_rows = any(batch.num_rows for batch in batches)
    return [*zip(schema.names, schema.types, strict=True)] if has_rows else []


def arrow_rows(uri: str, start: int, rows: int) -> Iterator[tuple[int, pa.Table]]:
    """Up to ``rows`` rows at a time, from row ``start`` on, with the number of the first; pyarrow's errors as they are."""
    first = 0
    with _opened(uri) as (schema, batches):
        names = _class_names(schema)
        for batch in batches:
            table = pa.Table.from_batches([batch])
            for place in range(max(start - first, 0), len(table), rows):
                yield first + place, _named(table.slice(place, rows), names)
            first += len(table)


@contextmanager
def _opened(uri: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        is_stream = file.read(len(_MAGIC)) != _MAGIC
        file.seek(0)
        with pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file) as reader:
            yield reader.schema, iter(reader) if is_stream else map(reader.get_batch, range(reader.num_record_batches))


def _class_names(schema: pa.Schema) -> dict[str, pa.Array]:
    """The names of the classes of each column that has classes in lists."""
    try:
        features = json.loads((schema.metadata or {})[_FEATURES])["info"]["features"]
        inner = {name: _of_list(feature) for name, feature in features.items()}
        return {
            name: pa.array(feature["names"], pa.string())
            for name, feature in inner.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError):  # written by others
        return {}


def _of_list(feature: Any) -> Any:
    """What a list holds, if a feature is one; earlier versions of datasets wrote it as a list of one feature."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return feature.get("feature", feature) if isinstance(feature, dict) else feature


def _named(table: pa.Table, names: dict[str, pa.Array]) -> pa.Table:
    for column, known in names.items():
        place = table.schema.get_field_index(column)
        values = None if place < 0 else plain(table.column(place))
        if values is None or not is_list(values.type):
            continue
        flat, parents = pc.list_flatten(values), pc.list_parent_indices(values).to_numpy()
        is_class = pc.and_(pc.greater_equal(flat, 0), pc.less(flat, len(known)))
        labels = known.take(pc.if_else(is_class, flat, pa.scalar(None, flat.type)))
        table = table.set_column(place, column, lists_from_rows(parents, labels, len(values)))
    return table

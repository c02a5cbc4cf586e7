"""What leaves a `Predictor`: a table with predictions, whose schema says what has made them.

Whoever writes it has no use for torch, and gets it here without.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xmc_ray import __version__
from xmc_ray.data.labels import IntArray
from xmc_ray.on_ray.stream import token_columns

_MADE_BY = b"made_by"  # key of a predicted table's metadata


@dataclass(frozen=True)
class NothingToPredict:
    """In place of a `Predictor` of ``k`` labels where every row is a reject: no model is loaded."""

    n_tokenizers: int
    k: int
    made_by: Mapping[str, str]

    def __call__(self, table: pa.Table) -> pa.Table:
        """All rows are padded with -1. ValueError for a row that is no reject."""
        if table["reason"].null_count:
            raise ValueError("a document to tag, and no model")
        shape = len(table), self.k
        table = table.drop_columns(token_columns(self.n_tokenizers))
        return with_predictions(table, np.full(shape, -1, np.int64), np.zeros(shape, np.float32), self.made_by)


def with_predictions(table: pa.Table, ids: IntArray, scores: npt.NDArray[np.float32], made_by: Mapping[str, str]) -> pa.Table:
    """A table with its predictions; its schema says what has made them."""
    for name, values in (("ids", ids), ("probabilities", scores)):
        table = table.append_column(name, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]))
    return table.replace_schema_metadata({_MADE_BY: json.dumps(dict(made_by))})


def made_by(computed_by: Iterable[str]) -> dict[str, str]:
    """What computes here, with the arithmetic of each model: tags of two releases, or by two arithmetics, may differ."""
    return {"release": __version__, "arithmetic": ", ".join(sorted(set(computed_by)))}


def made_by_of(table: pa.Table) -> dict[str, str]:
    """What computed a table that a `Predictor` has returned."""
    return dict(json.loads((table.schema.metadata or {}).get(_MADE_BY, b"{}")))


def matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of fixed-size lists as an array [rows, size], also of a table without rows."""
    column = table[name]
    return np.asarray(column.combine_chunks().flatten()).reshape(len(table), column.type.list_size)

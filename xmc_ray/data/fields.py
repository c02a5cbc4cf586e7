"""Fields: the parts of a document that the model tells apart, such as title and body, each with a weight.

A document stays one string and one list of tokens (decision 0032):

    string    its fields one after the other, `MARK` between any two: n fields, n - 1 marks, empty fields included
    tokens    id + number of the field x 2^24

So a text without marks is its own first field, and a token of a model without fields is its id.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray.data.labels import lists_from_rows

MARK = "\x1f"  # ASCII's unit separator
MOST = 127  # fields whose tokens fit into int32

_BITS = 24  # of an id; vocabularies have 20 at most


class Field(NamedTuple):
    """A field's name, the weight of its terms, and how many of its tokens are read, by default all."""

    name: str
    weight: float = 1.0
    first: int | None = None


Fields = tuple[Field, ...]
"""The fields of a model in the order in which it reads them; empty for a model of plain texts."""


def names_of(fields: Fields) -> list[str]:
    """The fields' names."""
    return [field.name for field in fields]


def join(parts: Sequence[pa.Array]) -> pa.StringArray:
    """string[n], of the fields' texts, string[n] each; null is empty, and a mark in a text becomes a space."""
    clean = [pc.replace_substring(part.cast(pa.string()).fill_null(""), MARK, " ") for part in parts]
    return reduce(lambda left, right: pc.binary_join_element_wise(left, right, MARK), clean)


def split(texts: pa.Array, n_fields: int) -> list[pa.StringArray]:
    """The fields' texts, string[n] each, of ``texts`` as `join` makes them; those that a text lacks are empty."""
    parts = pc.split_pattern(texts, MARK, max_splits=n_fields - 1)
    lengths = pc.list_value_length(parts).to_numpy()
    starts, values = np.concatenate([[0], np.cumsum(lengths)])[:-1], pc.list_flatten(parts)
    places = [pa.array(starts + number, mask=number >= lengths) for number in range(n_fields)]
    return [values.take(place).fill_null("") for place in places]


def readable(texts: pa.Array) -> pa.StringArray:
    """``texts`` for people: fields on lines of their own."""
    return pc.replace_substring(texts, MARK, "\n")


def numbered_lists(ids: pa.ListArray, number: int) -> pa.ListArray:
    """The tokens, list<int32>[n], of field ``number``, counted from 0."""
    values = pc.list_flatten(ids).to_numpy() + np.int32(number << _BITS)
    return lists_from_rows(pc.list_parent_indices(ids).to_numpy(), pa.array(values), len(ids))


def concatenated(parts: Sequence[pa.ListArray]) -> pa.ListArray:
    """Lists of the values of all ``parts``, one part after the other in each row."""
    rows = np.concatenate([pc.list_parent_indices(part).to_numpy() for part in parts])
    order = np.argsort(rows, kind="stable")
    values = pa.concat_arrays([pc.list_flatten(part) for part in parts])
    return lists_from_rows(rows[order], values.take(pa.array(order)), len(parts[0]))


def ids_of(tokens: Any) -> Any:
    """The ids of tokens (an integer, or an array or tensor of them), as a tokenizer and a transformer know them."""
    return tokens & ((1 << _BITS) - 1)


def numbers_of(tokens: Any) -> Any:
    """The number of each token's field."""
    return tokens >> _BITS

"""Strings out of Arrow columns of any type: what counts as a string, as UTF-8, as blank."""

import pyarrow as pa
import pyarrow.compute as pc

_NULL = pa.scalar(None, pa.string())
_TEXTS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


def is_text(kind: pa.DataType, *, integers: bool = False) -> bool:
    """Whether values of this type are strings, or null: bytes count, since old writers do not mark them as text.

    ``integers`` count as well if so said, decimal numbers without a fraction included.
    """
    kind = _plain_type(kind)
    is_integer = pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)
    return any(check(kind) for check in _TEXTS) or (integers and is_integer)


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists."""
    kind = _plain_type(kind)
    return any(check(kind) for check in _LISTS)


def list_values(kind: pa.DataType) -> pa.DataType:
    """The type of the values in lists of this type."""
    return _plain_type(kind).value_type


def as_strings(values: pa.Array | pa.ChunkedArray, *, integers: bool) -> tuple[pa.StringArray, pa.BooleanArray]:
    """string[n], null where a value is none, not yet checked by `keep_utf8`; and bool[n], whether one is there that is no text.

    Integers are decimal text if ``integers`` is true.
    """
    values = plain(values)
    if not is_text(values.type, integers=integers):
        return pa.nulls(len(values), pa.string()), values.is_valid()
    return values.cast(pa.string(), safe=False), pa.repeat(False, len(values))  # safe: would fail on what is not UTF-8


def plain(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The same values in one piece, without dictionaries, runs and types of extensions."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.ExtensionArray):
        return plain(values.storage)
    if pa.types.is_dictionary(values.type):
        return plain(values.dictionary_decode())
    if pa.types.is_run_end_encoded(values.type):
        return plain(pc.run_end_decode(values))
    return values


def keep_utf8(texts: pa.StringArray) -> tuple[pa.StringArray, pa.BooleanArray]:
    """``texts``, null where they are not UTF-8, and bool[n], false there.

    Parquet files may hold such bytes, of which nothing complains until something decodes them.
    """
    try:
        texts.validate(full=True)
        return texts, pa.repeat(True, len(texts))
    except pa.ArrowInvalid:
        raw = texts.cast(pa.binary()).to_pylist()
        good = [text is None or text.decode(errors="ignore").encode() == text for text in raw]
        kept = [text if is_good else None for text, is_good in zip(raw, good, strict=True)]
        return pa.array(kept, pa.binary()).cast(pa.string()), pa.array(good, pa.bool_())


def trimmed(texts: pa.StringArray) -> pa.StringArray:
    """``texts`` without surrounding white space; null where nothing is left."""
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), _NULL, texts)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    return _plain_type(kind.value_type) if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) else kind

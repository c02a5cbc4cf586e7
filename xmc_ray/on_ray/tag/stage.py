"""Tagging as a stage of somebody else's Ray Data pipeline.

    tag_dataset(ray.data.read_parquet(...), "s3://shop/bundle", text="title", pool=PoolConfig(max=8, gpu=True))
    dataset.map_batches(Tagger, fn_constructor_kwargs={"bundle": Members.read("s3://shop/bundle")}, batch_size=4096, ...)

Every row comes out with all its columns, in its place, and with its tags beside them: it is predicted, and ids become labels,
by the code of a night. What belongs to a night, such as rejects, reuse, resuming and counts, is left to the pipeline.
"""

import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from ray.data.block import BlockAccessor

from xmc_ray import storage
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.fields import readable
from xmc_ray.data.filters import FiltersConfig, LabelFilters, resolve
from xmc_ray.data.values import misfit
from xmc_ray.errors import ConfigError
from xmc_ray.model.precision import settled
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predictor import Predictor
from xmc_ray.on_ray.stream import token_columns, tokenise_table
from xmc_ray.on_ray.tag.pieces import TagColumns
from xmc_ray.on_ray.tag.rerank import RerankConfig, Reranked
from xmc_ray.settings import OpenShare, PositiveInt, Share

Bundle = Members | storage.Uri | Sequence[storage.Uri]

_AT_ONCE = 1024  # rows whose texts are gathered: 1 GiB of them at the default max_bytes, and Arrow's strings end at 2
_OURS = "xmc_ray."  # begins the names of columns that travel between the two steps of `tag_dataset`
_SETTINGS = {"text": "text or id", "id": "text or id", "filter": "filters.column"}  # that name a column
_PICKLED = "ray.data.arrow_pickled_object"  # Ray Data's type for columns of values of several types


@dataclass(frozen=True, kw_only=True)
class StageConfig(ScoringConfig):
    """What a stage reads, and what it adds; where ``scoring`` is auto it is grouped."""

    text: str | list[str] = "text"
    """Column of the text, or several, joined in this order; null and blank ones are skipped."""
    separator: str = "\n"
    """Separator of joined texts; a bundle with fields needs exactly their columns, which have a separator of their own."""
    id: str | None = None
    """Column of the ids, strings or integers, if a row without one is not to be tagged."""
    max_bytes: PositiveInt = 1 << 20
    """Maximum length of a text in bytes of UTF-8; longer ones are not tagged."""
    k: PositiveInt = 10
    """Maximum number of tags per row, at most all labels."""
    min_score: Share = 0.0
    """Minimum score of a tag."""
    min_precision: OpenShare | None = None
    """Drop tags below the threshold at which their label reaches this precision; needs calibrated bundles."""
    prefix: str = ""
    """What the names of new columns begin with."""
    filters: FiltersConfig | LabelFilters | None = None
    """Which labels a row may get, as in a night; with a column, a row that names no filter that there is is not tagged."""
    rerank: RerankConfig | None = None
    """A hook that scores the best labels again."""

    def check(self) -> None:
        """Raises ConfigError if no column is named, or if settings do not go together."""
        if not self.columns:
            raise ConfigError("no column of the text is named", found=repr(self.text), expected="one name or several")
        if not isinstance(self.filters, FiltersConfig | LabelFilters | None):
            found = type(self.filters).__name__
            raise ConfigError("invalid value of StageConfig.filters", found=found, expected="a FiltersConfig")
        if self.rerank is not None:
            self.rerank.check_use(self.k, self.min_precision)

    @property
    def columns(self) -> list[str]:
        """The columns of the text."""
        return [self.text] if isinstance(self.text, str) else self.text

    @property
    def rules(self) -> Rules:
        """How rows become documents: as those of a file in a night."""
        named = [("id", self.id)] if self.id is not None else []
        filters = None if self.label_filters is None else self.label_filters.documents_column
        columns = [*named, *(("text", name) for name in self.columns), *([("filter", filters.name)] if filters else [])]
        return Rules(columns, self.separator, self.max_bytes, "", filters)

    @property
    def label_filters(self) -> LabelFilters | None:
        """``filters`` over the labels of the bundles that the config was made ``of``."""
        return self.filters if isinstance(self.filters, LabelFilters) else None

    def of(self, members: Members) -> "StageConfig":
        """As these bundles read the columns, and with filters over their labels.

        ConfigError if they have fields, and the columns are others, and for filters that do not fit; DataError for their table.
        """
        documents = DocumentsConfig(uri="a dataset", text=self.columns, separator=self.separator)
        filters = self.filters
        if isinstance(filters, FiltersConfig):
            filters = replace(resolve(filters, members.labels()), of=members.fingerprint) if filters.is_set else None
        elif filters is not None and filters.of != members.fingerprint:  # its ids would be other labels here
            found, way_out = f"that of {filters.of or 'an unknown one'}", "give a FiltersConfig"
            raise ConfigError("filters over the labels of another bundle", found=found, way_out=way_out)
        return replace(self, separator=members.reading(documents).separator, filters=filters)

    def check_columns(self, names: Sequence[str]) -> None:
        """ConfigError if columns to read are not among ``names``, or if new ones are."""
        for setting, name in self.rules.columns:
            if name not in names:
                way_out = f"set {_SETTINGS[setting]}"
                raise ConfigError(f"the dataset has no column {name!r}", found=", ".join(names), way_out=way_out)
        if taken := [name for name in map(self.named, ("labels", "scores", "names", "reason")) if name in names]:
            way_out = "set prefix, such as prefix='predicted_'"
            raise ConfigError("the dataset has columns of these names already", found=", ".join(taken), way_out=way_out)

    def named(self, column: str) -> str:
        """The name of a new column."""
        return self.prefix + column


class Tagger:
    """A callable for `map_batches` that holds the model, or all models of an ensemble; usable directly as well.

    A batch is a pyarrow table, a DataFrame or a dictionary of arrays; a table comes back, with all columns, its rows in order,
    and these further ones (each name after ``prefix``): ``labels``, list<string>; ``scores``, list<float>, falling; ``names``,
    list<string>, if the bundle has any; ``reason``, null, or one of a few phrases that says why a row is not tagged, such as
    ``text is null``, ``text is empty``, ``text is not a string``. Such a row has empty lists, as one without a tag good
    enough has. Batches of some thousand rows are best, since documents of like length are padded together.
    """

    def __init__(self, bundle: Bundle, *, pool: PoolConfig | None = None, **settings: Any) -> None:
        """``settings``: the fields of `StageConfig`.

        ``bundle``: a folder, local or s3://, several for an ensemble, or what `Members.read` has said of them, which holds all
        actors to the same weights: ModelError if one finds others. ``pool``: what an actor computes on; if not given, the GPU
        that Ray has assigned to it, or else as many threads as torch has been told. Raises ConfigError for settings that are
        wrong, and ModelError for a bundle that cannot be read.
        """
        members = _members(bundle)
        pool = _assigned() if pool is None else pool
        if not (pool.max or pool.threads):  # of a number of actors, which nobody has said, each would get a part of the cores
            pool = replace(pool, threads=torch.get_num_threads())
        self.config = StageConfig(**settings).of(members)
        least = self.config.min_precision
        thresholds_L = None if least is None else members.thresholds(least)
        k, rerank = self.config.k, self.config.rerank
        listed, filters = rerank.candidates if rerank else k, self.config.label_filters
        predictor = Predictor(members, listed, pool, self.config, filters)
        self.predict = Reranked(lambda: predictor, rerank, k) if rerank else predictor
        labels = predictor.ensemble.labels.to_table()
        self.columns = TagColumns(labels, members.fingerprint, self.config.min_score, thresholds_L)
        self.tokens = Tokens(self.config, predictor.ensemble.tokenizers)

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table:
        """The batch with its tags. ConfigError if a column is missing, or if a new one is there already."""
        table = as_table(batch)
        return self.tagged(table, self.tokens(table))

    def tagged(self, table: pa.Table, tokens: pa.Table) -> pa.Table:
        """``table`` with the tags of what `Tokens` has made of it."""
        lists = self.columns.lists(self.predict(tokens))
        for name in ("labels", "scores", "names"):
            if name in lists:
                table = table.append_column(self.config.named(name), lists[name])
        return table.append_column(self.config.named("reason"), tokens["reason"])


def tag_dataset(
    dataset: ray.data.Dataset, bundle: Bundle, *, pool: PoolConfig | None = None, batch_rows: int = 4096, **settings: Any
) -> ray.data.Dataset:
    """A dataset with the columns that `Tagger` adds, computed when it is consumed.

    Texts are tokenised in CPU tasks, together with what comes before, so that actors have nothing to do but to predict.
    ``pool``: how many actors, and of what size (`PoolConfig`); ``batch_rows``: rows that an actor takes at a time;
    ``settings``: the fields of `StageConfig`. The bundle is read here, once: actors that find other weights in its place raise
    ModelError, and all of them compute by the same arithmetic. Raises what `Tagger` raises, before anything is computed where
    the columns are known by then, and ConfigError if Ray has too few CPUs.
    """
    pool, members = pool or PoolConfig(), _members(bundle)
    config = StageConfig(**settings).of(members)
    if config.min_precision is not None:
        members.check_precision()
    if config.rerank is not None:
        config.rerank.resolve()
    with suppress(pa.ArrowException):  # of blocks with columns of several types, Ray Data knows no schema
        schema = dataset.schema(fetch_if_missing=False)
        if schema is not None:
            config.check_columns(schema.names)
    pool = pool.settled().beside_tasks()
    settings["precision"] = settled(config.precision, pool.device)
    _, tokenizers = members.fetch()
    tokenised = dataset.map_batches(_Tokenised(Tokens(config, tokenizers)).__call__, batch_format="pyarrow", batch_size=None)
    given = {"bundle": members, "pool": pool, **settings, "filters": config.filters}  # which were read once
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_rows}
    return tokenised.map_batches(_TokensTagger, fn_constructor_kwargs=given, **batches, **pool.resources)


@dataclass(frozen=True)
class Tokens:
    """Turns the texts of a table into ``reason`` and the tokens of each tokenizer, which are empty where there is a reason.

    Filters of rows need ``filter`` as well, a hook ``text``.
    """

    config: StageConfig
    tokenizers: Sequence[Tokenizer]

    @property
    def names(self) -> list[str]:
        """The columns that come out."""
        further = {"filter": self.config.label_filters is not None and self.config.label_filters.column is not None}
        further |= {"text": self.config.rerank is not None}
        return ["reason", *token_columns(len(self.tokenizers)), *(name for name, is_there in further.items() if is_there)]

    def __call__(self, table: pa.Table) -> pa.Table:
        """ConfigError if a column is missing, or if a new one is there already."""
        if len(table):  # a block without rows may have no columns
            self.config.check_columns(table.column_names)
        return pa.concat_tables(map(self._tokenised, _slices(table)))

    def _tokenised(self, table: pa.Table) -> pa.Table:
        documents = documents_of(table, self.config.rules)
        tokenised = tokenise_table(documents.select(["text", "reason"]), self.tokenizers)
        if "filter" in self.names:
            tokenised = tokenised.append_column("filter", documents["filter"])
        if "text" in self.names:
            tokenised = tokenised.append_column("text", readable(documents["text"].combine_chunks()))
        return tokenised.select(self.names)


@dataclass(frozen=True)
class _Tokenised:
    """The first step of `tag_dataset`."""

    tokens: Tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        if taken := {_OURS + name for name in self.tokens.names} & {*table.column_names}:
            way_out = f"rename what begins with {_OURS}"
            raise ConfigError("the dataset has columns of the stage's own", found=", ".join(sorted(taken)), way_out=way_out)
        tokens = self.tokens(table)
        for name in self.tokens.names:
            table = table.append_column(_OURS + name, tokens[name])
        return table


class _TokensTagger(Tagger):
    """The second step of `tag_dataset`."""

    def __call__(self, batch: pa.Table | Mapping[str, Any]) -> pa.Table:
        table = as_table(batch)
        ours = [_OURS + name for name in self.tokens.names]
        tokens = table.select(ours).rename_columns(self.tokens.names)
        return self.tagged(table.drop_columns(ours), tokens)


def documents_of(table: pa.Table, rules: Rules) -> pa.Table:
    """What `Rules` makes of the rows of a table, of which some columns may hold values of several types."""
    reason = pa.nulls(len(table), pa.string())
    for setting, name in rules.columns:
        place = table.schema.get_field_index(name)
        if place >= 0 and getattr(table.schema.field(place).type, "extension_name", None) == _PICKLED:
            values, is_wrong = _unpickled(table.column(place), integers=setting in ("id", "filter"))
            table = table.set_column(place, name, values)
            reason = pc.if_else(is_wrong, misfit(setting), reason)
    documents = rules.from_parquet(table, "", 0)
    place = documents.schema.get_field_index("reason")
    return documents.set_column(place, "reason", pc.coalesce(reason, documents["reason"]))


def as_table(batch: pa.Table | Mapping[str, Any]) -> pa.Table:
    """A batch of any format of Ray Data as a table; arrays that Arrow has no type for are converted as Ray Data does it."""
    return batch if isinstance(batch, pa.Table) else pa.table({name: _column(batch[name]) for name in batch})


def _column(values: Any) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array(values, from_pandas=True if getattr(values, "dtype", None) == np.dtype(object) else None)
    except (pa.ArrowException, UnicodeError, OverflowError):
        return BlockAccessor.batch_to_arrow_block({"values": np.asarray(values)})["values"]


def _members(bundle: Bundle) -> Members:
    return bundle if isinstance(bundle, Members) else Members.read(bundle)


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    starts = range(0, max(1, len(table)), _AT_ONCE)
    return (table.slice(first, min(_AT_ONCE, len(table) - first)) for first in starts)  # a table of no column has any length


class _Plain(pickle.Unpickler):
    """Reads strings, numbers, lists; refuses whatever would have to be imported, and so could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def _unpickled(column: pa.ChunkedArray, *, integers: bool) -> tuple[pa.Array, pa.Array]:
    """The strings (and integers) of a column of pickled values, as bytes; and bool[n], whether another value is there."""
    values = [None if value is None else _plain(value) for value in column.combine_chunks().storage.to_pylist()]
    texts = [_text(value, integers) for value in values]
    is_wrong = [text is None and not _is_null(value) for text, value in zip(texts, values, strict=True)]
    return pa.array(texts, pa.binary()), pa.array(is_wrong, pa.bool_())


def _plain(value: bytes) -> Any:
    try:
        return _Plain(io.BytesIO(value)).load()
    except Exception:  # a damaged pickle raises anything
        return NotImplemented


def _text(value: Any, integers: bool) -> bytes | None:
    if isinstance(value, bytes):  # text of old writers, as in files
        return value
    is_text = isinstance(value, str) or (integers and type(value) is int)
    return str(value).encode(errors="surrogatepass") if is_text else None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _assigned() -> PoolConfig:
    """What this process may compute on."""
    gpu = ray.is_initialized() and bool(ray.get_gpu_ids())
    return PoolConfig(gpu=gpu, threads=torch.get_num_threads())

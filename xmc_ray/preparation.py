"""From documents on storage to what training needs: cached tokens, label index, label groups, a held-out split."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from xmc_ray import access, storage
from xmc_ray.classifier import FitConfig
from xmc_ray.corpus import read_documents
from xmc_ray.documents import DocumentsConfig
from xmc_ray.errors import ConfigError
from xmc_ray.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.inputs import list_inputs, read_names
from xmc_ray.labels import IntArray, LabelIndex
from xmc_ray.lexical import LexicalConfig, term_weights
from xmc_ray.metrics import Metrics
from xmc_ray.session import arrow_batches
from xmc_ray.text import Tokenizer
from xmc_ray.tokens import FORMAT, MARKER, Split, TokenCache, write_tokens


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Documents kept out of training to watch it by."""

    share: float = 0.02
    """Share of the training documents that is held out, chosen by a hash of their words; 0 trains on all, blindly."""
    series: str | None = None
    """Column of what a document is one of many of, such as a collection or a seller, strings or integers: all documents of a
    series are held out, or none, by a hash of its name. The words decide where it is null or blank."""
    every: float = 1.0
    """Epochs from one validation (and checkpoint) to the next; the end of training always has one."""
    metric: str = "nDCG@5"
    """The metric that the best checkpoint is best in."""
    calibrate: bool = True
    """Put half of the held-out documents by, by the same hash, to calibrate the scores on; false chooses by all of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError("validation.share does not fit", found=self.share, expected="0 to below 1")
        if self.every <= 0:
            raise ConfigError("validation.every does not fit", found=self.every, expected="more than 0 epochs")
        known = [name for name in Metrics.empty(np.ones(1, np.int64), 1).result()["total"] if "@" in name]
        if self.metric not in known:
            raise ConfigError("validation.metric is unknown", found=self.metric, expected=", ".join(known))


@dataclass
class Prepared:
    """``tokens``: documents as tokens and label ids, on storage; ``term_weights``: of the lexical branch, if there is one."""

    tokens: TokenCache
    tokenizer: Tokenizer
    labels: LabelIndex
    groups: LabelGroups
    term_weights: npt.NDArray[np.float32] | None

    @property
    def counts(self) -> dict[str, int]:
        """Documents by what became of them."""
        return self.tokens.counts


def prepare(
    documents: DocumentsConfig, label_names: str | None, fit: FitConfig, validation: ValidationConfig, cache: str
) -> Prepared:
    """Tokenise the documents, unless that is done already; count and group their labels.

    Below ``cache`` each combination of files (by size and version), columns, tokenizer, length and held-out share has a folder
    of its own, named by a fingerprint of all that: a stale one is never looked at. Labels and their counts are those of all
    documents, held out or not; groups see only what is trained on. Raises DataError when nothing is left to train on.
    """
    names = read_names(label_names) if label_names else None
    tokenizer = Tokenizer.load(fit.encoder.name, fit.text.max_tokens)
    place = storage.join(cache, _fingerprint(documents, tokenizer, validation, fit.loop.seed))
    if not storage.exists(storage.join(place, MARKER)):
        _tokenise_all(documents, tokenizer, validation, fit.loop.seed, place)
    tokens = TokenCache.open(place)
    labels = tokens.labels if names is None else tokens.labels.with_names(names)
    return Prepared(tokens, tokenizer, labels, _groups(tokens, fit.groups), _term_weights(tokens, fit.lexical))


def _fingerprint(documents: DocumentsConfig, tokenizer: Tokenizer, validation: ValidationConfig, seed: int) -> str:
    files = [[file.uri, file.size, file.version] for file in list_inputs(documents)]
    columns = [documents.id, documents.text, documents.separator, documents.labels, documents.max_bytes]
    dealt = [validation.share, validation.calibrate, *filter(None, [validation.series])]
    content = json.dumps([FORMAT, files, columns, tokenizer.fingerprint, *dealt, seed])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _tokenise_all(
    documents: DocumentsConfig, tokenizer: Tokenizer, validation: ValidationConfig, seed: int, place: str
) -> None:
    """Through Ray's object store, which spills to disk, once for the labels and once, shuffled, for the tokens."""
    rows = read_documents(documents, labelled=True, series=validation.series)
    tokenised = tokenise(rows, tokenizer, held_out=validation).materialize()
    counts: Counter[str] = Counter()
    labels = LabelIndex.count(_labels_and_counts(tokenised, counts))
    shared = ray.put(labels)
    train, chooses, calibrates = (
        tokenised.map_batches(partial(_usable, part=part, labels=shared), batch_format="pyarrow", batch_size=None)
        for part in (0, 1, 2)
    )
    splits: dict[Split, Iterator[pa.Table]] = {
        "train": arrow_batches(train.random_shuffle(seed=seed)),
        "validation": arrow_batches(chooses),
        "calibration": arrow_batches(calibrates),
    }
    write_tokens(place, labels, counts, splits, documents.uri)


def _groups(tokens: TokenCache, config: GroupsConfig) -> LabelGroups:
    """The groups of the labels; those that a clustering has made lie beside the tokens."""
    if config.max_size == 1:
        return LabelGroups(np.arange(len(tokens.labels)))
    uri = storage.join(tokens.place, tokens.attempt, f"groups-{config.max_size}-{config.features}-{config.seed}.parquet")
    if storage.exists(uri):
        filesystem, path = access.arrow_filesystem(uri)
        return LabelGroups(pq.read_table(path, filesystem=filesystem)["group"].to_numpy().astype(np.int64))
    groups = group_labels(config, tokens.column("train", "tokens"), tokens.column("train", "labels"), len(tokens.labels))
    with storage.new_file(uri) as file:
        pq.write_table(pa.table({"group": groups.group_L}), file)
    return groups


def _term_weights(tokens: TokenCache, config: LexicalConfig) -> npt.NDArray[np.float32] | None:
    """The weights of the lexical branch's terms; they lie beside the tokens, too."""
    if not config.width:
        return None
    uri = storage.join(tokens.place, tokens.attempt, f"terms-{config.columns}-{config.rarest}.parquet")
    if not storage.exists(uri):
        with storage.new_file(uri) as file:
            pq.write_table(pa.table({"weight": term_weights(tokens.column("train", "tokens"), config)}), file)
    filesystem, path = access.arrow_filesystem(uri)
    return np.asarray(pq.read_table(path, filesystem=filesystem)["weight"], np.float32)


def tokenise(
    documents: ray.data.Dataset, *tokenizers: Tokenizer, held_out: ValidationConfig | None = None, keep_text: bool = False
) -> ray.data.Dataset:
    """``text`` becomes ``tokens`` (list<int32>, empty for rejects), ``truncated`` and ``held_out`` (int8), on CPU tasks.

    Each tokenizer has its own `token_columns`; ``truncated`` is what any of them cuts off. ``held_out`` is 0, 1 for
    documents that choose the best epoch, 2 for those that calibrate, by ``series`` or ``text``, which are left out, ``text``
    unless it is asked for; other columns stay as they are.
    """
    task = partial(tokenise_table, tokenizers=tokenizers, held_out=held_out, keep_text=keep_text)
    return documents.map_batches(task, batch_format="pyarrow", batch_size=2048)


def token_columns(n_tokenizers: int) -> list[str]:
    """The columns of several tokenizers' tokens: ``tokens``, ``tokens_1``, and so on."""
    return ["tokens", *(f"tokens_{number}" for number in range(1, n_tokenizers))]


def tokenise_table(
    table: pa.Table, tokenizers: Sequence[Tokenizer], held_out: ValidationConfig | None = None, keep_text: bool = False
) -> pa.Table:
    """What `tokenise` does with a batch."""
    good = pc.is_null(table["reason"]).combine_chunks()
    texts = pc.if_else(good, table["text"].combine_chunks().fill_null(""), "")
    encoded = [tokenizer.encode(texts) for tokenizer in tokenizers]
    for name, (tokens, _) in zip(token_columns(len(tokenizers)), encoded, strict=True):
        table = table.append_column(name, pc.if_else(good, tokens, pa.scalar([], tokens.type)))
    truncated = reduce(pc.or_, (cut_off for _, cut_off in encoded))
    table = table.append_column("truncated", pc.and_(good, truncated).cast(pa.int8()))
    has_series = "series" in table.column_names
    series = table["series"].combine_chunks() if has_series else pa.nulls(len(table), pa.string())
    table = table.append_column("held_out", pa.array(_dealt(texts, series, held_out), pa.int8()))
    return table.drop_columns(["series"] * has_series + ["text"] * (not keep_text))


def _dealt(texts: pa.Array, series: pa.Array, validation: ValidationConfig | None) -> IntArray:
    """The use of each text by a hash of its series or else its words, 0, 1 or 2: the same in every run and on every machine.

    Documents of a series have the same use, and so have those without one that say the same, or the held-out ones would reward
    learning by heart. Where there is no series and no word, there is nothing to hold out.
    """
    limit = 0 if validation is None else int(validation.share * 2**32)
    if validation is None or not limit:
        return np.zeros(len(texts), np.int64)
    words = pc.utf8_trim(pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\pL\pN]+", " "), " ")
    series = pc.utf8_trim_whitespace(series.fill_null(""))
    keys = pc.if_else(pc.equal(series, ""), words, series)
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys.to_pylist())
    first_D, second_D = np.frombuffer(digests, ">u4").reshape(-1, 2).T
    calibrates_D = second_D % 2 == 1 if validation.calibrate else np.zeros(len(texts), bool)  # further bits: not the share's
    return np.where((first_D < limit) & (np.asarray(pc.binary_length(keys)) > 0), 1 + calibrates_D, 0)


def _labels_and_counts(tokenised: ray.data.Dataset, counts: Counter[str]) -> Iterator[pa.ListArray]:
    """The label lists of the good rows, block by block; ``counts`` is filled on the way."""
    columns = tokenised.select_columns(["labels", "truncated", "reason"])
    for table in arrow_batches(columns):
        good = table.filter(pc.is_null(table["reason"]))
        lists = _list(good, "labels")
        counts["truncated"] += pc.sum(good["truncated"]).as_py() or 0
        counts["unlabelled"] += pc.sum(pc.equal(pc.list_value_length(lists).fill_null(0), 0)).as_py() or 0
        for entry in pc.value_counts(table["reason"].drop_null()).to_pylist():
            counts[f"rejected: {entry['values']}"] += entry["counts"]
        yield lists


def _usable(table: pa.Table, part: int, labels: ray.ObjectRef[LabelIndex]) -> pa.Table:
    """The good, labelled rows of a part (``held_out`` 0, 1 or 2); labels as ids."""
    table = table.filter(pc.and_(pc.is_null(table["reason"]), pc.equal(table["held_out"], part)))
    ids = ray.get(labels).encode(_list(table, "labels"))
    return pa.table({"tokens": table["tokens"], "labels": ids}).filter(pa.array(np.diff(ids.offsets) > 0))


def _list(table: pa.Table, name: str) -> pa.ListArray:
    return table[name].combine_chunks()

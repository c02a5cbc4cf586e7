"""From documents on storage to what training needs: cached tokens, label index, label groups, a held-out split."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.reader import list_inputs, read_names
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.token_cache import FORMAT, MARKER, Split, TokenCache, write_tokens
from xmc_ray.model.lexical import LexicalConfig, term_weights
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.session import arrow_batches
from xmc_ray.on_ray.stream import read_documents, tokenise
from xmc_ray.training.fit import FitConfig


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
        filesystem, path = storage.arrow_filesystem(uri)
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
    filesystem, path = storage.arrow_filesystem(uri)
    return np.asarray(pq.read_table(path, filesystem=filesystem)["weight"], np.float32)


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

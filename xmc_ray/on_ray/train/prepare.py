"""From documents on storage to what training needs: cached tokens, a label index, label groups, held-out splits."""

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
import ray.data

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.reader import list_inputs
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.token_cache import FORMAT, MARKER, Split, TokenCache, write_tokens
from xmc_ray.model.lexical import LexicalConfig, term_weights
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.session import arrow_batches
from xmc_ray.on_ray.stream import read_documents, tokenise
from xmc_ray.storage.files import FileInfo
from xmc_ray.training.fit import FitConfig


@dataclass
class Prepared:
    """``tokens``: documents as tokens and label ids, on storage; ``term_weights``: float32[F] if there is a lexical branch."""

    tokens: TokenCache
    tokenizer: Tokenizer
    labels: LabelIndex
    groups: LabelGroups
    term_weights: npt.NDArray[np.float32] | None

    @property
    def counts(self) -> dict[str, int]:
        """Documents of each split, and those truncated, unlabelled or rejected."""
        return self.tokens.counts


def prepare(
    documents: DocumentsConfig, label_names: str | None, fit: FitConfig, validation: ValidationConfig, cache: str
) -> Prepared:
    """Tokenise the documents, unless they are cached; count and group their labels.

    A folder below ``cache`` is named by a fingerprint of the files (size and version), columns, tokenizer, length and held-out
    share, so a stale one is never read. Labels and their counts are those of all documents, held out or not; groups see only
    training documents. Raises DataError when none is left to train on.
    """
    names = storage.read_parquet(label_names) if label_names else None
    tokenizer = Tokenizer.load(fit.encoder.name, fit.text.max_tokens)
    files = list_inputs(documents)  # once: the fingerprint is that of the very files that are read
    folder = storage.join(cache, _fingerprint(files, documents, tokenizer, validation, fit.loop.seed))
    if not storage.exists(storage.join(folder, MARKER)):
        _tokenise_all(files, documents, tokenizer, validation, fit.loop.seed, folder)
    tokens = TokenCache.open(folder)
    labels = tokens.labels if names is None else tokens.labels.with_names(names)
    return Prepared(tokens, tokenizer, labels, _groups(tokens, fit.groups), _term_weights(tokens, fit.lexical))


def _fingerprint(
    files: list[FileInfo], documents: DocumentsConfig, tokenizer: Tokenizer, validation: ValidationConfig, seed: int
) -> str:
    versions = [[file.uri, file.size, file.version] for file in files]
    columns = [documents.id, documents.text, documents.separator, documents.labels, documents.max_bytes]
    split = [validation.share, validation.calibrate, *filter(None, [validation.series])]
    content = json.dumps([FORMAT, versions, columns, tokenizer.fingerprint, *split, seed])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _tokenise_all(
    files: list[FileInfo],
    documents: DocumentsConfig,
    tokenizer: Tokenizer,
    validation: ValidationConfig,
    seed: int,
    folder: str,
) -> None:
    """Write the token cache. Tokens stay in Ray's object store, which spills to disk, until all labels are counted."""
    rows = read_documents(documents, labelled=True, series=validation.series, files=files)
    tokenised = tokenise(rows, tokenizer, held_out=validation).materialize()
    counts: Counter[str] = Counter()
    labels = LabelIndex.count(_labels_and_counts(tokenised, counts))
    shared = ray.put(labels)
    train, chooses, calibrates = (
        tokenised.map_batches(partial(_usable, use=use, labels=shared), batch_format="pyarrow", batch_size=None)
        for use in (0, 1, 2)
    )
    splits: dict[Split, Iterator[pa.Table]] = {
        "train": arrow_batches(train.random_shuffle(seed=seed)),
        "validation": arrow_batches(chooses),
        "calibration": arrow_batches(calibrates),
    }
    write_tokens(folder, labels, counts, splits, documents.uri)


def _groups(tokens: TokenCache, config: GroupsConfig) -> LabelGroups:
    """The groups of the labels; a clustering is kept beside the tokens."""
    if config.max_size == 1:
        return LabelGroups(np.arange(len(tokens.labels)))
    uri = tokens.uri(f"groups-{config.max_size}-{config.features}-{config.seed}.parquet")
    if storage.exists(uri):
        return LabelGroups(storage.read_parquet(uri)["group"].to_numpy().astype(np.int64))
    groups = group_labels(config, tokens.column("train", "tokens"), tokens.column("train", "labels"), len(tokens.labels))
    storage.write_parquet(uri, pa.table({"group": groups.group_L}))
    return groups


def _term_weights(tokens: TokenCache, config: LexicalConfig) -> npt.NDArray[np.float32] | None:
    """The weights of the lexical branch's terms, kept beside the tokens as well."""
    if not config.width:
        return None
    uri = tokens.uri(f"terms-{config.columns}-{config.rarest}.parquet")
    if not storage.exists(uri):
        storage.write_parquet(uri, pa.table({"weight": term_weights(tokens.column("train", "tokens"), config)}))
    return np.asarray(storage.read_parquet(uri)["weight"], np.float32)


def _labels_and_counts(tokenised: ray.data.Dataset, counts: Counter[str]) -> Iterator[pa.ListArray]:
    """The label lists of the good rows, block by block; fills ``counts`` as a side effect."""
    columns = tokenised.select_columns(["labels", "truncated", "reason"])
    for table in arrow_batches(columns):
        good = table.filter(pc.is_null(table["reason"]))
        lists = _list(good, "labels")
        counts["truncated"] += pc.sum(good["truncated"]).as_py() or 0
        counts["unlabelled"] += pc.sum(pc.equal(pc.list_value_length(lists).fill_null(0), 0)).as_py() or 0
        for entry in pc.value_counts(table["reason"].drop_null()).to_pylist():
            counts[f"rejected: {entry['values']}"] += entry["counts"]
        yield lists


def _usable(table: pa.Table, use: int, labels: ray.ObjectRef[LabelIndex]) -> pa.Table:
    """The good, labelled rows whose ``held_out`` is ``use`` (0, 1 or 2), with labels as ids."""
    table = table.filter(pc.and_(pc.is_null(table["reason"]), pc.equal(table["held_out"], use)))
    ids = ray.get(labels).encode(_list(table, "labels"))
    return pa.table({"tokens": table["tokens"], "labels": ids}).filter(pa.array(np.diff(ids.offsets) > 0))


def _list(table: pa.Table, name: str) -> pa.ListArray:
    return table[name].combine_chunks()

"""The tagging job: documents in, their best labels out, as Parquet in a folder for the day.

<output>/dt=2026-11-23/
    run.json          what this run is: input files, bundle, settings; written first
    part-*.parquet    tags
    rejects/          rows that cannot be tagged, with reasons
    manifest.json     counts, times, histograms
    _SUCCESS          written last; without it the folder is unfinished, and the same command starts it again
"""

import os
import time
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timezone
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from xmc_ray import storage
from xmc_ray.corpus import DocumentsConfig, list_inputs, read_documents, text_digest
from xmc_ray.ensemble import Ensemble, Members
from xmc_ray.errors import ConfigError
from xmc_ray.labels import list_lengths, lists_from_rows
from xmc_ray.loop import LoopConfig
from xmc_ray.preparation import token_columns, tokenise
from xmc_ray.session import connect, own_errors
from xmc_ray.sink import TagSink

SUCCESS, MANIFEST, IDENTITY = "_SUCCESS", "manifest.json", "run.json"
_SHOWN_LABELS = 1000  # the most frequent ones; a manifest with a million lines is read by nobody


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The actors that hold the model, or all models of an ensemble."""

    min: int = 1
    """Actors to start with."""
    max: int = 1
    """Actors at most; the pool grows towards it while documents wait."""
    gpu: bool = False
    """Give each actor a GPU."""
    cpus: int = 2
    """CPUs that an actor asks the cluster for; with 1 and no GPU, Ray would tokenise inside the actor, one after the other."""
    threads: int = 0
    """Threads of an actor on a CPU; 0 shares the machine's cores among ``max`` actors."""
    batch_rows: int = 2048
    """Documents that an actor takes at a time and sorts by length."""
    token_budget: int = 8192
    """Most tokens, padding included, that go through the encoder at once."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError("pool sizes do not fit", found=f"min {self.min}, max {self.max}", expected="1 <= min <= max")


@dataclass(frozen=True, kw_only=True)
class TagConfig:
    """Tag a catalogue with a bundle, or with an ensemble of them."""

    documents: DocumentsConfig
    """The catalogue."""
    bundle: str | list[str]
    """The model: a bundle's folder, local or s3://; or a list of them, whose scores are averaged."""
    output: str
    """Where the folders of the days lie."""
    date: str | None = None
    """The day, YYYY-MM-DD, that names the folder; today (UTC) if not given."""
    k: int = 10
    """Most tags a document gets."""
    min_score: float = 0.0
    """Tags with a lower score are left out."""
    overwrite: bool = False
    """Replace what another run has left in the day's folder."""
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError("k does not fit", found=self.k, expected="at least 1")
        if not 0 <= self.min_score <= 1:
            raise ConfigError("min_score does not fit", found=self.min_score, expected="0 to 1")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ConfigError("date does not fit", found=self.date, expected="YYYY-MM-DD") from None


def run(config: TagConfig) -> str:
    """Tag the catalogue and return the folder of the day; a finished run is left as it is.

    Raises ConfigError when the folder holds another run, DataError and ModelError for what cannot be read; nothing is
    written before the settings, the input and the bundle have been looked at.
    """
    started = datetime.now(timezone.utc)
    folder = storage.join(config.output, f"dt={config.date or started.date()}")
    members = Members.read(config.bundle)
    identity = {
        "bundle": members.fingerprint,
        "input": [asdict(file) for file in list_inputs(config.documents)],
        "config": {name: value for name, value in asdict(config).items() if name not in ("overwrite", "pool", "date")},
    }
    if _finished(folder, identity, config.overwrite):
        print(f"finished before, nothing to do: {folder}", flush=True)
        return folder
    connect()
    with own_errors():
        documents = read_documents(config.documents, labelled=False)  # looks at the first file's columns
        storage.remove(storage.join(folder, SUCCESS))
        storage.remove(folder, last=IDENTITY)
        storage.write_json(storage.join(folder, IDENTITY), identity)
        clock = time.monotonic()
        summary = _tag(documents, config, folder, members)
        manifest = identity | {
            "run": f"{folder.rsplit('/', 1)[-1]}-{members.fingerprint}",
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "documents_per_second": round(summary["in"] / (time.monotonic() - clock), 1),
            **summary,
        }
    storage.write_json(storage.join(folder, MANIFEST), manifest)
    storage.write_bytes(storage.join(folder, SUCCESS), b"")
    print(_report(manifest, folder), flush=True)
    return folder


def predictions(tokenised: ray.data.Dataset, bundles: list[str], k: int, pool: PoolConfig) -> ray.data.Dataset:
    """``ids`` (fixed list<int64>[k], -1 pads) and ``probabilities`` (list<float32>[k]) in the place of a stream's tokens."""
    return tokenised.map_batches(
        Predictor,
        fn_constructor_args=(bundles, k, pool),
        batch_format="pyarrow",
        batch_size=pool.batch_rows,
        compute=ActorPoolStrategy(min_size=pool.min, max_size=pool.max),
        num_cpus=pool.cpus,
        num_gpus=1 if pool.gpu else 0,
    )


class Predictor:
    """An actor with the model or models, loaded once."""

    def __init__(self, bundles: list[str], k: int, pool: PoolConfig) -> None:
        torch.set_num_threads(pool.threads or max(1, (os.cpu_count() or 1) // pool.max))
        self.k = k
        self.loop = LoopConfig(token_budget=pool.token_budget)
        self.ensemble = Ensemble.load(bundles).to("cuda" if pool.gpu else "cpu")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict every row that has tokens of every tokenizer; the others get pads."""
        columns = token_columns(len(self.ensemble.tokenizers))
        tokens = [table[name].combine_chunks() for name in columns]
        scores, ids = np.zeros((len(table), self.k), np.float32), np.full((len(table), self.k), -1, np.int64)
        rows = np.flatnonzero(np.all([list_lengths(lists) > 0 for lists in tokens], axis=0))
        taken = [lists.take(pa.array(rows)) for lists in tokens]
        scores[rows], ids[rows] = self.ensemble.predict(taken, self.k, self.loop)
        table = table.drop_columns(columns)
        table = table.append_column("ids", pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), self.k))
        return table.append_column("probabilities", pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), self.k))


class TagColumns:
    """From predicted ids to the columns of the contract: labels, scores, names, model."""

    def __init__(self, labels: pa.Table, fingerprint: str, min_score: float) -> None:
        self.labels = labels["label"].combine_chunks()
        self.names = labels["name"].combine_chunks() if labels["name"].null_count < len(labels) else None
        self.fingerprint = fingerprint
        self.min_score = min_score

    def __call__(self, table: pa.Table) -> pa.Table:
        """``ids`` and ``probabilities`` become lists without pads and without scores below the minimum."""
        ids, scores = matrix(table, "ids"), matrix(table, "probabilities")
        kept = (ids >= 0) & (scores >= self.min_score)
        rows, places = np.nonzero(kept)[0], pa.array(ids[kept])
        columns = {"labels": self.labels.take(places), "scores": pa.array(scores[kept])}
        if self.names is not None:
            columns["names"] = self.names.take(places)
        table = table.drop_columns(["ids", "probabilities"])
        for name, values in columns.items():
            table = table.append_column(name, lists_from_rows(rows, values, len(table)))
        return table.append_column("model", pa.array([self.fingerprint] * len(table), pa.string()))


def matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of lists of one fixed size as an array, rows by values; also of a table without rows."""
    column = table[name]
    return np.asarray(column.combine_chunks().flatten()).reshape(len(table), column.type.list_size)


def _tag(documents: ray.data.Dataset, config: TagConfig, folder: str, members: Members) -> dict[str, Any]:
    """Write tags and rejects; the counts of the manifest."""
    labels_file, tokenizers = members.fetch()
    labels = pq.read_table(labels_file, columns=["label", "name"])
    digested = documents.map_batches(_digest, batch_format="pyarrow", batch_size=2048)
    predicted = predictions(tokenise(digested, *tokenizers), members.uris, config.k, config.pool)
    columns = TagColumns(labels, members.fingerprint, config.min_score)
    sink = TagSink(folder, sums=["truncated"])
    predicted.map_batches(columns.__call__, batch_format="pyarrow", batch_size=None).write_datasink(sink)
    shown = dict(islice(sink.summary["labels"].items(), _SHOWN_LABELS))
    return {**sink.summary, "labels": shown, "distinct_labels": len(sink.summary["labels"])}


def _digest(table: pa.Table) -> pa.Table:
    return table.append_column("text_digest", text_digest(table["text"].combine_chunks()))


def _finished(folder: str, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether this very run is done. Raises ConfigError when the folder holds anything else that must not be lost."""
    if storage.is_empty(folder):
        return False
    where = storage.join(folder, IDENTITY)
    known = storage.read_json(where) if storage.exists(where) else None
    if known is None:
        raise ConfigError(
            "the folder of the day holds something else", where=folder, found="no run.json", way_out="choose another output"
        )
    if known == identity:
        return storage.exists(storage.join(folder, SUCCESS)) and not overwrite
    if not overwrite:
        raise ConfigError(
            "the folder of the day holds another run",
            where=folder,
            found=f"other {', '.join(name for name in identity if known.get(name) != identity[name])}",
            way_out="choose another output or date, or give --overwrite",
        )
    return False


def _report(manifest: dict[str, Any], folder: str) -> str:
    return (
        f"tagged {manifest['tagged']:,} of {manifest['in']:,} documents, rejected {manifest['rejected']:,}, "
        f"truncated {manifest['truncated']:,}, {manifest['documents_per_second']:,} documents/s: {folder}"
    )

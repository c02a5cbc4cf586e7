"""From documents on storage to what training needs: cached tokens, a label index, label groups, held-out splits."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from xmc_ray import storage
from xmc_ray.data.feedback import Feedback
from xmc_ray.data.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.data.inputs import list_inputs
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.data.profile import Profile
from xmc_ray.data.rejects import Rejects
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.tables import read_label_names
from xmc_ray.data.token_cache import FORMAT, MARKER, Split, TokenCache, write_tokens
from xmc_ray.errors import one_line
from xmc_ray.model.lexical import LexicalConfig, term_weights
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.session import arrow_batches
from xmc_ray.on_ray.stream import read_documents, tokenise
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.labelled import is_usable, usable, uses_of, with_verdicts
from xmc_ray.storage.listing import FileInfo

_REJECTED, _LOST = "rejected: ", "unread bytes"  # names of counts


@dataclass
class Prepared:
    """``tokens``: documents as tokens and label ids, on storage; ``term_weights``: float32[F] if there is a lexical branch.

    ``feedback``: the fingerprint of what editors have said of the documents' labels, which is in them already; None without.
    """

    tokens: TokenCache
    tokenizer: Tokenizer
    labels: LabelIndex
    groups: LabelGroups
    term_weights: npt.NDArray[np.float32] | None
    feedback: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Documents of each split, and those truncated, unlabelled or rejected."""
        return self.tokens.counts

    def held_out(self, validation: ValidationConfig, source: str) -> "Prepared":
        """The same with some of the documents held out, if nothing is so far, and without reading those of ``source`` again.

        DataError when none is left to train on.
        """
        return replace(self, tokens=self.tokens.held_out(validation, source))


def prepare(config: TrainConfig) -> Prepared:
    """Tokenise the documents, unless they are cached; count and group their labels.

    A folder of the cache is named by a fingerprint of the files (size and version), columns, tokenizer, length, held-out share
    and feedback, so a stale one is never read. Labels and their counts are those of all documents, held out or not; groups see
    only training documents. Raises DataError when too many documents are rejected, when none is left to train on, and for
    feedback that cannot be read or is of other labels.
    """
    names = read_label_names(config.label_names)
    config = replace(config, documents=config.documents.with_fields([*(config.text.fields or {})]))
    tokenizer = Tokenizer.load(config.encoder.name, config.text.max_tokens, config.text.described())
    inputs = list_inputs(config.documents)  # once: the fingerprint is that of the very files that are read
    if inputs.left_out:
        say(str(inputs))
    files = inputs.files
    feedback = None if config.feedback.uri is None else Feedback.read(config.feedback.uri)
    cache = config.cache or storage.join(config.output, "tokens")
    folder = storage.join(cache, _fingerprint(config, files, tokenizer, feedback))
    if not storage.exists(storage.join(folder, MARKER)):
        _tokenise_all(config, files, tokenizer, folder, feedback)
    tokens = TokenCache.open(folder)
    _check_rejects(config, _rejects_of(tokens.counts, files))  # of an earlier run, perhaps, which allowed more
    labels = tokens.labels if names is None else tokens.labels.with_names(names)
    if names is not None and labels.names.null_count == len(labels):
        say(f"warning: none of the labels has a name in {config.label_names}, such as {one_line(str(labels.labels[0]))}")
    parts = _groups(tokens, config.groups), _term_weights(tokens, config.lexical)
    return Prepared(tokens, tokenizer, labels, *parts, None if feedback is None else feedback.fingerprint)


def profile(prepared: Prepared) -> Profile:
    """What kind of data the documents to train on are."""
    tokens = prepared.tokens
    return Profile.of(tokens.column("train", "tokens"), tokens.column("train", "labels"), prepared.labels)


def _fingerprint(config: TrainConfig, files: list[FileInfo], tokenizer: Tokenizer, feedback: Feedback | None) -> str:
    documents, validation = config.documents, config.validation
    versions = [[file.uri, file.size, file.version] for file in files]
    columns = [documents.id, documents.text, documents.separator, documents.labels, documents.max_bytes]
    columns += [] if documents.label_separator is None else [documents.label_separator]
    split = [validation.share, validation.calibrate, *filter(None, [validation.series])]
    judged = [] if feedback is None else [feedback.fingerprint]
    content = json.dumps([FORMAT, versions, columns, tokenizer.fingerprint, *split, config.loop.seed, *judged])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _tokenise_all(
    config: TrainConfig, files: list[FileInfo], tokenizer: Tokenizer, folder: str, feedback: Feedback | None
) -> None:
    """Write the token cache. Tokens stay in Ray's object store, which spills to disk, until all labels are counted."""
    rows = read_documents(config.documents, labelled=True, series=config.validation.series, files=files)
    verdicts = None if feedback is None else ray.put(feedback)
    if verdicts is not None:
        rows = rows.map_batches(partial(with_verdicts, feedback=verdicts), batch_format="pyarrow", batch_size=None)
    tokenised = tokenise(rows, tokenizer, drawn=True).materialize()
    counts: Counter[str] = Counter()
    rejects = Rejects(sum(file.size for file in files))
    labels = LabelIndex.count(_good_labels(config, tokenised, counts, rejects))
    if feedback is not None:
        labels = _corrected(tokenised, labels, counts, feedback, config.validation)
    shared = ray.put(labels)
    train, validation, calibration = (
        tokenised.map_batches(
            partial(usable, use=use, validation=config.validation, labels=shared, feedback=verdicts),
            batch_format="pyarrow",
            batch_size=None,
        )
        for use in (0, 1, 2)
    )
    splits: dict[Split, Iterator[pa.Table]] = {
        "train": arrow_batches(train.random_shuffle(seed=config.loop.seed)),
        "validation": arrow_batches(validation),
        "calibration": arrow_batches(calibration),
    }
    write_tokens(folder, labels, counts, splits, config.documents.uri)


def _corrected(
    tokenised: ray.data.Dataset, labels: LabelIndex, counts: Counter[str], feedback: Feedback, validation: ValidationConfig
) -> LabelIndex:
    """The ``labels`` counted again as the feedback has them; updates ``counts`` and says what does not count."""
    found_V, n_L = np.zeros(len(feedback), bool), np.zeros(len(labels), np.int64)
    unlabelled = 0
    for table in arrow_batches(tokenised.select_columns(["labels", "verdicts", "draw", "reason"])):
        table = table.filter(pc.is_null(table["reason"])).combine_chunks()
        verdicts = table["verdicts"].combine_chunks()
        found_V[verdicts.flatten().to_numpy()] = True
        truth, judged = feedback.corrected(labels.encode(table["labels"].combine_chunks()), verdicts, labels.labels)
        n_L += np.bincount(truth.flatten().to_numpy(), minlength=len(labels))
        unlabelled += int((~is_usable(uses_of(table, validation), truth, judged)).sum())
    say(str(feedback.tally(found_V, labels.labels)))
    counts["unlabelled"] = unlabelled
    return labels.recounted(n_L)


def _groups(tokens: TokenCache, config: GroupsConfig) -> LabelGroups:
    """The groups of the labels; a clustering is kept beside the tokens."""
    if config.max_size == 1:
        return LabelGroups(np.arange(len(tokens.labels)))
    uri = tokens.uri(f"groups-{config.max_size}-{config.features}-{config.seed}.parquet")
    if storage.exists(uri):
        return LabelGroups(storage.read_parquet(uri)["group"].to_numpy().astype(np.int64))
    documents, threads = (tokens.column("train", "tokens"), tokens.column("train", "labels")), len(os.sched_getaffinity(0))
    groups = group_labels(config, *documents, len(tokens.labels), threads)
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


def _check_rejects(config: TrainConfig, rejects: Rejects) -> None:
    way_out = "fix the documents, or run again with a higher max_reject_share"
    rejects.check(config.max_reject_share, where=config.documents.uri, way_out=way_out)


def _rejects_of(counts: Mapping[str, int], files: list[FileInfo]) -> Rejects:
    """The rejects that a token cache counts."""
    reasons = Counter({name.removeprefix(_REJECTED): n for name, n in counts.items() if name.startswith(_REJECTED)})
    rows = reasons.total() + sum(counts.get(name, 0) for name in ("train", "validation", "calibration", "unlabelled"))
    return Rejects(sum(file.size for file in files), rows, counts.get(_LOST, 0), reasons)


def _good_labels(
    config: TrainConfig, tokenised: ray.data.Dataset, counts: Counter[str], rejects: Rejects
) -> Iterator[pa.ListArray]:
    """The label lists of the good rows, block by block; fills ``counts`` and ``rejects``, and checks these at the end."""
    columns = tokenised.select_columns(["labels", "truncated", "reason", "lost_bytes"])
    for table in arrow_batches(columns):
        good = table.filter(pc.is_null(table["reason"]))
        lists = good["labels"].combine_chunks()
        counts["truncated"] += pc.sum(good["truncated"]).as_py() or 0
        counts["unlabelled"] += int((list_lengths(lists) == 0).sum())
        rejects.add(table["reason"], pc.sum(table["lost_bytes"]).as_py() or 0)
        yield lists
    counts.update({f"{_REJECTED}{reason}": rows for reason, rows in rejects.reasons.items()})
    counts[_LOST] = rejects.lost_bytes
    _check_rejects(config, rejects)

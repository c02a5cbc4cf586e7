"""Tokenised documents whose labels training can use; steps of `prepare` that run in tasks, and need no torch there."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from xmc_ray.data.feedback import Feedback
from xmc_ray.data.labels import LabelIndex, list_lengths


def with_verdicts(table: pa.Table, feedback: ray.ObjectRef[Feedback]) -> pa.Table:
    """With a column ``verdicts``, list<int64>: their numbers in the feedback."""
    verdicts: Feedback = ray.get(feedback)
    return table.append_column("verdicts", verdicts.of_documents(table["id"]))


def usable(table: pa.Table, use: int, labels: ray.ObjectRef[LabelIndex], feedback: ray.ObjectRef[Feedback] | None) -> pa.Table:
    """The good, labelled rows whose ``held_out`` is ``use`` (0, 1 or 2), with labels as ids; with feedback, also ``judged``."""
    table = table.filter(pc.and_(pc.is_null(table["reason"]), pc.equal(table["held_out"], use)))
    index: LabelIndex = ray.get(labels)
    truth = index.encode(table["labels"].combine_chunks())
    if feedback is None:
        return pa.table({"tokens": table["tokens"], "labels": truth}).filter(pa.array(list_lengths(truth) > 0))
    verdicts: Feedback = ray.get(feedback)
    truth, judged = verdicts.corrected(truth, table["verdicts"].combine_chunks(), index.labels)
    kept = pa.array(is_usable(table["held_out"], truth, judged))
    return pa.table({"tokens": table["tokens"], "labels": truth, "judged": judged}).filter(kept)


def is_usable(held_out: pa.ChunkedArray, truth: pa.ListArray, judged: pa.ListArray) -> npt.NDArray[np.bool_]:
    """bool[n]: what a label is known of; in training, that it is wrong will do."""
    known: npt.NDArray[np.bool_] = list_lengths(truth) > 0
    known |= (list_lengths(judged) > 0) & (np.asarray(held_out) == 0)
    return known

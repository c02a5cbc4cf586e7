"""Tokenised documents whose labels training can use; steps of `prepare` that run in tasks, and need no torch there."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from xmc_ray.data.feedback import Feedback
from xmc_ray.data.labels import IntArray, LabelIndex, list_lengths
from xmc_ray.data.split import ValidationConfig, uses


def with_verdicts(table: pa.Table, feedback: ray.ObjectRef[Feedback]) -> pa.Table:
    """With a column ``verdicts``, list<int64>: their numbers in the feedback."""
    verdicts: Feedback = ray.get(feedback)
    return table.append_column("verdicts", verdicts.of_documents(table["id"]))


def usable(
    table: pa.Table,
    use: int,
    validation: ValidationConfig,
    labels: ray.ObjectRef[LabelIndex],
    feedback: ray.ObjectRef[Feedback] | None,
) -> pa.Table:
    """The good, labelled rows that ``validation`` puts to ``use`` (`split.uses`), with labels as ids; with feedback, also
    ``judged``.
    """
    use_D = uses_of(table, validation)
    table = table.filter(pc.and_(pc.is_null(table["reason"]), pa.array(use_D == use)))
    index: LabelIndex = ray.get(labels)
    truth = index.encode(table["labels"].combine_chunks())
    if feedback is None:
        documents = pa.table({"tokens": table["tokens"], "labels": truth, "draw": table["draw"]})
        return documents.filter(pa.array(list_lengths(truth) > 0))
    verdicts: Feedback = ray.get(feedback)
    truth, judged = verdicts.corrected(truth, table["verdicts"].combine_chunks(), index.labels)
    kept = pa.array(is_usable(uses_of(table, validation), truth, judged))
    return pa.table({"tokens": table["tokens"], "labels": truth, "judged": judged, "draw": table["draw"]}).filter(kept)


def uses_of(table: pa.Table, validation: ValidationConfig) -> IntArray:
    """`split.uses` of rows with a column ``draw``."""
    return uses(table["draw"].to_numpy(), validation)


def is_usable(use_D: IntArray, truth: pa.ListArray, judged: pa.ListArray) -> npt.NDArray[np.bool_]:
    """bool[n]: what a label is known of; in training, that it is wrong will do."""
    known: npt.NDArray[np.bool_] = list_lengths(truth) > 0
    known |= (list_lengths(judged) > 0) & (use_D == 0)
    return known

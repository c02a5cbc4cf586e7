"""Rows that training can use. With feedback: `test_prepare`."""

import numpy as np
import pyarrow as pa
import ray

from xmc_ray.data.labels import LabelIndex
from xmc_ray.data.split import ValidationConfig
from xmc_ray.on_ray.train.labelled import is_usable, usable


def lists(*rows: list[int]) -> pa.ListArray:
    return pa.array(rows, pa.list_(pa.int32()))


def test_a_document_without_labels_is_used_only_to_learn_what_it_is_not() -> None:
    truth, judged, use_D = lists([1], [], [], []), lists([], [], [2], [2]), np.array([1, 0, 0, 1])
    assert is_usable(use_D, truth, judged).tolist() == [True, False, True, False]


def test_each_use_has_its_own_good_rows(ray_session: None) -> None:
    tokens = lists([1], [2], [3], [4], [5])
    labels = [["pear"], ["plum", "pear"], [], ["plum"], ["pear"]]
    reasons = pa.array([None, None, None, "text is null", None], pa.string())
    draws = pa.array([2**64 - 1] * 4 + [1], pa.uint64())  # the last one is held out of any share, and odd, for calibration
    table = pa.table({"tokens": tokens, "labels": labels, "reason": reasons, "draw": draws})
    index = ray.put(LabelIndex.count([table["labels"].combine_chunks()]))
    parts = [usable(table, use, ValidationConfig(), index, None) for use in (0, 1, 2)]
    assert [part["tokens"].to_pylist() for part in parts] == [[[1], [2]], [], [[5]]]
    assert parts[0].column_names == ["tokens", "labels", "draw"]
    assert [part["labels"].to_pylist() for part in parts] == [[[0], [1, 0]], [], [[0]]]

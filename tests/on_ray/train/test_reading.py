"""Steps out of a stream, wherever it is cut. That they are those of the plan, `test_worker` shows."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.epochs import EpochPlan
from xmc_ray.errors import DataError
from xmc_ray.on_ray.train import reading
from xmc_ray.on_ray.train.reading import share_of_steps

PLAN = EpochPlan(n_documents=6, batch_size=2, window=2048, seed=7)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sets(st.integers(1, 20)))
def test_a_step_is_one_table_wherever_the_stream_is_cut(sizes: list[int], cuts: set[int]) -> None:
    step = np.repeat(np.arange(len(sizes)), sizes)
    table = pa.table({"step": step, "row": np.arange(len(step))})
    ends = [0, *sorted(cut for cut in cuts if cut < len(step)), len(step)]
    parts = [table.slice(first, last - first) for first, last in pairwise(ends)]
    tables = list(reading._by_step(iter(parts)))
    assert [len(part) for part in tables] == sizes
    assert pa.concat_tables(tables).equals(table)


def test_a_step_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(_: object) -> list[pa.Table]:
        return [pa.table({"step": [0, 0, 2]})]

    class Pools:
        def map_batches(self, *_: object, **__: object) -> None: ...

    monkeypatch.setattr(reading, "arrow_batches", stream)
    monkeypatch.setattr(reading.ray.data, "from_items", lambda *_, **__: Pools())
    steps = share_of_steps(None, PLAN, 1, 0, 0, 1)  # type: ignore[arg-type]
    assert len(next(steps)) == 2
    with pytest.raises(DataError, match="batches are out of order; found step 2; expected step 1"):
        next(steps)


def test_nothing_is_read_once_all_steps_are_done() -> None:
    assert list(share_of_steps(None, PLAN, 2, 2 * PLAN.steps, 0, 1)) == []  # type: ignore[arg-type]

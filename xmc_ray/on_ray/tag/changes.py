"""What a night has changed: a row for each document whose labels or scores are not those of the night before.

Who has applied the night before applies these rows, and has this one. Rows that were reused are the same by construction, so
only the other rows of both nights are compared: matched by id, in tasks that each take one share of all ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.labels import list_lengths
from xmc_ray.data.reader import check_unchanged
from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.nights import CHANGES, SUCCESS, marker_of, tag_files
from xmc_ray.on_ray.tag.pieces import written
from xmc_ray.on_ray.tag.plan import Mask, Plan, unpacked
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.on_ray.tag.scan import share_of
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import FileInfo

KINDS = ("added", "changed", "removed")
_LABELS, _SCORES = pa.list_(pa.string()), pa.list_(pa.float32())
_SIDES = [("labels", _LABELS), ("scores", _SCORES), ("labels_before", _LABELS), ("scores_before", _SCORES)]
SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), *_SIDES])
"""A side is null where the night has no such document: tags of before for what was added, tags of now for what was removed."""

_TAGS = pa.schema([("id", pa.string()), ("labels", _LABELS), ("scores", _SCORES)])
_TASK_BYTES = 256 << 20  # of files that one task reads
_SHARE_ROWS = 1 << 20  # of both nights in one share, whose task takes a few hundred bytes for each


def write_changes(
    folder: str, run: str, plan: Plan, work: str, before: str, runner: Runner
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write what the pieces in ``work`` change of the finished night ``before``, as files of ``run`` in ``folder``.

    Returns what the manifest says of it (that night, its run, rows of each kind), and the rows of each file by its name; the
    same files if it is done again. Raises DataError if the night before is damaged, or changes or is removed meanwhile.
    """
    files, marker = tag_files(before), marker_of(before)
    if marker is None:  # removed meanwhile
        raise DataError("not a finished night", where=before, found=f"no {SUCCESS}")
    keep = {row["uri"]: row["keep"] for row in plan.reused.to_pylist()} if plan.previous == before else {}
    pieces = [(file, b"") for name, file in written(work).items() if name.startswith("t")]
    rows = plan.rows + sum(marker.get("rows", {}).values()) - 2 * (pc.sum(plan.reused["rows"]).as_py() or 0) * bool(keep)
    shares = 1 + max(0, rows) // _SHARE_ROWS
    now = [_submit(task, shares, runner) for task in _tasks(pieces)]
    then = [_submit(task, shares, runner) for task in _tasks([(file, keep.get(file.uri, b"")) for file in files])]
    names = [f"{CHANGES}/part-{run}-{share:05}.parquet" for share in range(shares)]
    compared = [
        runner.submit(_compare, join(folder, name), len(now), *(part[share] for part in (*now, *then)))
        for share, name in enumerate(names)
    ]
    del now, then
    counts = runner.get(compared)
    total = {kind: sum(count[kind] for count in counts) for kind in KINDS}
    return {"night": before, "run": marker["run"], **total}, dict(
        zip(names, (sum(count.values()) for count in counts), strict=True)
    )


def _tasks(files: Sequence[tuple[FileInfo, bytes]]) -> Iterator[list[tuple[FileInfo, bytes]]]:
    task: list[tuple[FileInfo, bytes]] = []
    for file in files:
        if task and sum(other.size for other, _ in task) + file[0].size > _TASK_BYTES:
            yield task
            task = []
        task.append(file)
    if task:
        yield task


def _submit(task: list[tuple[FileInfo, bytes]], shares: int, runner: Runner) -> Sequence[Any]:
    """Handles of the rows of each share."""
    handle = runner.submit(_read, task, shares, returns=shares)
    return [handle] if shares == 1 else handle


def _read(task: list[tuple[FileInfo, bytes]], shares: int) -> pa.Table | list[pa.Table]:
    """The rows of some files, without those of their masks, in shares by id."""
    tables = []
    for file, mask in task:
        table = storage.read_parquet(file.uri, _TAGS.names)
        check_unchanged(file)
        tables.append(table.filter(pa.array(~unpacked(mask, len(table)))).cast(_TAGS))
    table = pa.concat_tables(tables).combine_chunks()
    if shares == 1:
        return table
    share = share_of(table["id"], shares)
    order = np.argsort(share, kind="stable")
    ends = np.searchsorted(share[order], np.arange(1, shares)).tolist()
    table = table.take(pa.array(order))
    return [table.slice(first, last - first) for first, last in zip([0, *ends], [*ends, len(table)], strict=True)]


def _compare(target: str, n_now: int, *tables: pa.Table) -> Mapping[str, int]:
    """Write the changes of one share; the rows of each kind. The first ``n_now`` tables are of this night."""
    changes = compare(*(pa.concat_tables([_TAGS.empty_table(), *part]) for part in (tables[:n_now], tables[n_now:])))
    storage.write_parquet(target, changes)
    return {kind: pc.sum(pc.equal(changes["kind"], kind)).as_py() or 0 for kind in KINDS}


def compare(now: pa.Table, before: pa.Table) -> pa.Table:
    """Rows of `SCHEMA`, by id, of two tables of ``id``, ``labels`` and ``scores`` in which each id comes once."""
    now, before = now.combine_chunks(), before.combine_chunks()
    at = pc.index_in(now["id"], value_set=before["id"]).combine_chunks()
    is_gone = np.ones(len(before), bool)
    is_gone[at.drop_null().to_numpy()] = False
    removed = before.filter(pa.array(is_gone))
    before = before.take(at)  # rows of null where there is none
    is_known = at.is_valid()
    differs = ~(_same(now["labels"], before["labels"]) & _same(now["scores"], before["scores"]))
    kind = pc.if_else(is_known, "changed", "added")
    sides = [now["labels"], now["scores"], before["labels"], before["scores"]]
    changed = pa.Table.from_arrays([now["id"], kind, *sides], schema=SCHEMA).filter(pa.array(differs))
    nothing = [pa.nulls(len(removed), column.type) for column in (now["labels"], now["scores"])]
    columns = [removed["id"], pa.repeat("removed", len(removed)), *nothing, removed["labels"], removed["scores"]]
    return pa.concat_tables([changed, pa.Table.from_arrays(columns, schema=SCHEMA)]).sort_by("id")


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> Mask:
    """bool[rows]: whether two columns have the same list; null is no list."""
    left, right = (
        pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks() for column in (left, right)
    )
    both = pc.and_(pc.equal(pc.list_value_length(left), pc.list_value_length(right)), pc.is_valid(right)).fill_null(False)
    same: Mask = both.to_numpy(zero_copy_only=False).copy()
    values = [column.filter(both).flatten() for column in (left, right)]
    row = np.repeat(np.flatnonzero(same), list_lengths(left.filter(both)))
    same[row[pc.not_equal(*values).to_numpy(zero_copy_only=False)]] = False
    return same

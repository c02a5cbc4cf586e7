"""Pages, filters and positions, against the same over all rows at once."""

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_nights import write_night

from xmc_ray.errors import DataError
from xmc_ray.show.night import read_night
from xmc_ray.show.tags import START, Hits, Position, Query, document, extremes, search
from xmc_ray.storage.listing import FileInfo

DOCUMENTS = [
    (
        f"d{n:03}",
        f"text {n}",
        dict(sorted({"a": n / 100, "b": 1 - n / 100}.items(), key=lambda pair: -pair[1])) if n % 5 else {},
    )
    for n in range(90)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileInfo, ...]:
    return read_night(str(write_night(tmp_path_factory.mktemp("tags") / "out", "2026-11-24", DOCUMENTS, files=3))).files


def pages(files: tuple[FileInfo, ...], query: Query, limit: int) -> list[Hits]:
    shown, start = [], START
    while True:
        shown.append(search(files, query, start, limit, np.inf))
        if shown[-1].rest is None:
            return shown
        start = shown[-1].rest


@pytest.mark.parametrize("limit", [1, 7, 25, 1000])
@pytest.mark.parametrize(
    "query",
    [
        Query(),
        Query(label="a"),
        Query(label="a", least=0.5),
        Query(least=0.9),
        Query(untagged=True),
        Query(id="d041"),
        Query(id="x"),
    ],
)
def test_all_pages_together_are_the_documents_that_a_query_takes(files: tuple[FileInfo, ...], query: Query, limit: int) -> None:
    def takes(id: str, tags: dict[str, float]) -> bool:
        best = tags.get(query.label, -1) if query.label else max(tags.values(), default=-1)
        enough = best >= np.float32(query.least) if query.label or query.least else True
        return query.id in ("", id) and enough and not (query.untagged and tags)

    found = pages(files, query, limit)
    assert [row["id"] for row in chain(*(page.rows for page in found))] == [id for id, _, tags in DOCUMENTS if takes(id, tags)]
    assert all(len(page.rows) == limit for page in found[:-1])


def test_an_id_is_found_in_its_row_group_alone(files: tuple[FileInfo, ...]) -> None:
    assert search(files, Query(id="d041"), seconds=np.inf).read == 7
    row = document(files, "d041")
    with pytest.raises(DataError, match="not found in time; found 7 rows read"):
        document(files, "d0395", seconds=-1)
    assert row is not None and row["labels"] == ["b", "a"] and row["text_digest"] and document(files, "nobody") is None


def test_a_search_whose_time_is_over_says_so_and_goes_on(files: tuple[FileInfo, ...]) -> None:
    first = search(files, Query(id=""), limit=1000, seconds=-1)
    assert first.late and first.read == 7 and first.rest == Position(0, 7)
    assert search(files, Query(), first.rest, 1, np.inf).rows[0]["id"] == "d007"


def test_the_best_and_the_worst(files: tuple[FileInfo, ...]) -> None:
    found = extremes(files, "a", 4, np.inf)
    scored = sorted(((tags["a"], id) for id, _, tags in DOCUMENTS if tags), reverse=True)
    assert [each.id for each in found.best] == [id for _, id in scored[:4]]
    assert [each.id for each in found.worst] == [id for _, id in scored[:-5:-1]]
    assert (found.documents, found.read, found.late) == (72, 90, False)
    few = extremes(files[:1], "b", 20, np.inf)
    assert len(few.best) == 20 and len(few.worst) == 4 and not {*few.best} & {*few.worst}
    assert extremes(files, "a", 4, -1).late and extremes(files, "nothing").documents == 0


def test_files_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.parquet", tmp_path / "other.parquet"
    broken.write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"id": ["a"]}), other)
    for path, words in ((broken, "cannot be read"), (other, "no column 'labels'")):
        with pytest.raises(DataError, match=words):
            search([FileInfo(uri=str(path), size=1, version="")], Query())

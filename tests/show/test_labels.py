"""Labels of a night, out of its counts."""

from pathlib import Path

import pytest
from made_nights import write_night

from xmc_ray.errors import DataError
from xmc_ray.show.labels import Count, Counts, count_of, frequent

DOCUMENTS = [
    (f"d{n}", "", {"Red": 0.5} | ({"blue": 0.25} if n < 3 else {}) | ({"infrared": 1.0} if n < 2 else {})) for n in range(8)
]


def test_the_most_frequent_that_contain_some_letters(tmp_path: Path) -> None:
    folder = str(write_night(tmp_path / "out", "2026-11-24", DOCUMENTS))
    red, blue, infrared = Count("Red", 8, 0.5), Count("blue", 3, 0.25), Count("infrared", 2, 1.0)
    assert frequent(folder) == Counts([red, blue, infrared], 3)
    assert frequent(folder, n=1) == Counts([red], 3)
    assert frequent(folder, "RED") == Counts([red, infrared], 2)
    assert frequent(folder, "(") == Counts([], 0)
    assert count_of(folder, "blue") == blue and count_of(folder, "nothing") is None


def test_counts_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        frequent(str(tmp_path))
    (tmp_path / "label-counts.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        count_of(str(tmp_path), "a")

"""What a night lists: its own folder and the one whose tags it reuses, whatever other nights lie beside them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fruit import document, write
from s3fs import S3FileSystem
from seaweed import S3

from xmc_ray.on_ray.tag import nights

DAYS = ["2026-11-20", "2026-11-21", "2026-11-22"]


_listed: list[str] | None = None  # where listings are noted while somebody wants them: an audit hook cannot be removed


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _listed is not None and event in ("os.scandir", "os.listdir") and arguments:
        _listed.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def listings() -> Iterator[list[str]]:
    """The local folders that are listed meanwhile."""
    global _listed
    _listed = folders = []
    try:
        yield folders
    finally:
        _listed = None


def test_a_night_lists_no_other_night_but_the_one_that_it_reuses(tag: Callable[..., str], tmp_path: Path) -> None:
    """Kind: cost. A year of nights has a hundred thousand files."""
    path = write(tmp_path / "in" / "a.parquet", [document(n) for n in range(20)])
    for day in DAYS:
        tag(path, date=day)
    with listings() as folders:
        night = tag(path, date="2026-11-23", previous="last")
    assert night in folders and f"{tmp_path}/out/_nights" in folders
    others = {day for day in DAYS for folder in folders if day in folder}
    assert others <= {DAYS[-1]}


def test_the_latest_night_is_found_by_its_day(s3: S3, tag: Callable[..., str], tmp_path: Path) -> None:
    """Kind: cost. On object storage a listing of all nights costs a request for a thousand files."""
    path = write(tmp_path / "in" / "a.parquet", [document(n) for n in range(20)])
    out = s3.uri("listed")
    for day in DAYS[:2]:
        tag(path, output=out, date=day)
    prefixes: list[str] = []
    find, ls = S3FileSystem._find, S3FileSystem._lsdir

    async def found(self: S3FileSystem, path: str, *given: Any, **named: Any) -> Any:
        prefixes.append(f"all of {path}")
        return await find(self, path, *given, **named)

    async def listed(self: S3FileSystem, path: str, *given: Any, **named: Any) -> Any:
        prefixes.append(path)
        return await ls(self, path, *given, **named)

    with patch.object(S3FileSystem, "_find", found), patch.object(S3FileSystem, "_lsdir", listed):
        assert nights.latest_before(f"{out}/_nights/dt={DAYS[-1]}") == f"{out}/_nights/dt={DAYS[1]}"
    place = out.removeprefix("s3://")
    assert prefixes == [place, f"{place}/_nights"]

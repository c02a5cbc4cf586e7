"""Tagging under kill -9 and worse: every id comes out once, and the night is the one that nothing happened to.

The table in docs/operations.md names the test of each fault.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import SECONDS, children, kill, running, submit, wait_for
from fruit import document, read_night

from xmc_ray import command, storage, tagging

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

ROWS, COMMIT_ROWS = 6_000, 600
REPEATED = 30  # further rows, whose ids were there before


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    rows = [document(n) for n in range(ROWS)]
    rows += [{"id": f"d{n}", "text": "a red plum"} for n in range(REPEATED)]
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(rows[part::3]), folder / f"{part}.parquet", row_group_size=700)
    return folder


@pytest.fixture(scope="module")
def arguments(trained: Path, catalogue: Path) -> Callable[[object], list[str]]:
    settings = {"documents.uri": catalogue, "bundle": trained / "bundle", "date": "2026-11-23", "k": 3}
    settings |= {"commit_rows": COMMIT_ROWS, "pool.threads": 1, "pool.max": 2, "pool.min": 2, "pool.cpus": 1}
    settings |= {"pool.token_budget": 256}  # small batches, so that there is time to disturb
    return lambda output: [*(f"--{name}={value}" for name, value in settings.items()), f"--output={output}"]


@pytest.fixture(scope="module")
def undisturbed(arguments: Callable[[object], list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tags by id of a night that nothing happens to, and its rejects."""
    output = tmp_path_factory.mktemp("undisturbed")
    return night(tagging.run(parse(arguments(output))))


def parse(arguments: list[str]) -> tagging.TagConfig:
    return command.parse(tagging.TagConfig, arguments)


def night(folder: object) -> dict[str, Any]:
    tags, rejects = read_night(folder)
    ids = tags["id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS and len(rejects) == REPEATED
    assert not storage.exists(storage.join(str(folder), "_work", "run.json"))
    by_id = {row.pop("id"): row for row in tags.to_pylist()}
    return {"tags": by_id, "rejects": sorted(rejects.to_pylist(), key=str)}


def pieces(output: object) -> set[str]:
    """The pieces that are done; none once the night is finished."""
    return {path.name for path in Path(str(output)).glob("dt=*/_work/pieces/[!.]*")}


def processes(stage: str) -> list[int]:
    """Ray's processes that work on a stage now."""
    return children(f"ray::MapBatches({stage}") + children(f"ray::MapWorker(MapBatches({stage}")


@pytest.mark.parametrize("stage", ["ReadPieces", "TagPieces", "WritePieces"])
def test_a_process_of_each_stage_is_killed(
    stage: str, arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with running(lambda: tagging.run(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: len(pieces(tmp_path)) >= 3)
        wait_for(lambda: kill(processes(stage)[:1]))
    assert night(outcome["result"]) == undisturbed


def test_a_write_is_killed_between_its_two_files(
    arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Rejects are written, the file that completes the piece is not."""
    work = tmp_path / "dt=2026-11-23" / "_work"

    def half_done() -> bool:
        rejects = {path.name for path in (work / "rejects").glob("[!.]*")}
        return bool(rejects - pieces(tmp_path)) and kill(processes("WritePieces"))

    with running(lambda: tagging.run(parse(arguments(tmp_path)))) as outcome:
        wait_for(half_done)
    assert night(outcome["result"]) == undisturbed


def test_the_driver_is_killed_and_a_kill_costs_no_more_than_it_may(
    arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The same command goes on; what was done stays, to the byte, and rows done again are bounded."""
    first = submit("tag", arguments(tmp_path))
    wait_for(lambda: len(pieces(tmp_path)) >= 6)
    orphans = children("ray::", of=first.pid)
    first.kill()
    first.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
    work = tmp_path / "dt=2026-11-23" / "_work"
    done = {name: (work / "pieces" / name).stat().st_mtime_ns for name in pieces(tmp_path)}
    rows = sum(pq.read_metadata(work / "pieces" / name).num_rows for name in done)

    second = submit("tag", arguments(tmp_path))
    wait_for(lambda: len(pieces(tmp_path)) > len(done) or second.poll() is not None)
    kept = {name: (work / "pieces" / name).stat().st_mtime_ns for name in done}
    assert kept == done
    output = second.communicate(timeout=SECONDS)[0]
    assert second.returncode == 0, output
    assert f"going on after {rows:,} of" in output or rows < int(
        output.split("going on after ")[1].split(" ")[0].replace(",", "")
    )
    assert night(tmp_path / "dt=2026-11-23") == undisturbed
    third = submit("tag", arguments(tmp_path))
    assert "nothing to do" in third.communicate(timeout=SECONDS)[0] and third.returncode == 0


def test_kills_at_random(arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Ten of them, of whatever works at the moment."""
    rng = random.Random(6088)
    killed = 0
    with running(lambda: tagging.run(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: pieces(tmp_path))
        while killed < 10 and "result" not in outcome and "error" not in outcome:
            time.sleep(rng.uniform(0.2, 1.0))
            found = [pid for stage in ("ReadPieces", "TagPieces", "WritePieces") for pid in processes(stage)]
            killed += kill(rng.sample(found, 1)) if found else 0
    assert killed == 10, "the night was over too soon"
    assert night(outcome["result"]) == undisturbed

"""What Ray does for a night: the same as a plain loop, one block a piece, on local files and on object storage."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import document, manifest_of, read_night, write
from in_process import InProcess
from seaweed import S3

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.session import connect, own_errors
from xmc_ray.on_ray.tag import runner
from xmc_ray.on_ray.tag.nights import files_named, latest, tags_folder
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.storage import folders
from xmc_ray.storage.files import join

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("group", [1, 8])
def test_a_piece_is_one_block_from_its_reader_to_its_writer(group: int) -> None:
    """Whether it has one row or more than Ray Data's largest batch, and whoever reads it together with others."""

    def read(pieces: list[dict[str, Any]]) -> Iterator[tuple[int, pa.Table]]:
        for piece in pieces:
            yield piece["number"], pa.table({"letter": ["x"] * piece["rows"]})

    def predict(table: pa.Table) -> pa.Table:
        return table.append_column("at_once", pa.array([len(table)] * len(table)))

    def write(number: int, table: pa.Table) -> dict[str, Any]:
        return {"number": number, "rows": len(table), "at_once": table["at_once"].unique().to_pylist()}

    sizes = [1, 3000, 2, 1, 50_000, 7, 7, 7, 7, 5000]
    plan = pa.table({"number": range(len(sizes)), "rows": sizes})
    groups = [plan.slice(start, group) for start in range(0, len(plan), group)]
    given = groups, read, lambda: predict, write, PoolConfig(max=2)
    with runner.one_block_per_piece():
        assert runner.stream(*given).materialize().num_blocks() == len(sizes)
    summaries = sorted(Runner().run_pieces(*given), key=lambda summary: summary["number"])
    assert summaries == list(InProcess().run_pieces(*given))
    assert summaries == [{"number": number, "rows": rows, "at_once": [rows]} for number, rows in enumerate(sizes)]


@pytest.mark.parametrize("step", ["read", "predict", "write"])
def test_an_error_of_a_step_comes_out_as_it_was_raised(step: str) -> None:
    def fail(name: str) -> None:
        if name == step:
            raise DataError("wrong", where=name)

    def read(pieces: list[dict[str, Any]]) -> Iterator[tuple[int, pa.Table]]:
        fail("read")
        yield 0, pa.table({"letter": ["x"]})

    def predict(table: pa.Table) -> pa.Table:
        fail("predict")
        return table

    def write(number: int, table: pa.Table) -> dict[str, Any]:
        fail("write")
        return {}

    connect()  # as `Runner.start` does
    with pytest.raises(DataError, match=f"^wrong: {step}$"), own_errors():
        list(Runner().run_pieces([pa.table({"number": [0]})], read, lambda: predict, write, PoolConfig(max=1)))


def test_pieces_that_were_put_together_are_refused() -> None:
    pieces = [runner._pack(number, pa.table({"letter": ["x"]})) for number in range(2)]
    assert runner._unpack(pieces[1]) == (1, pa.table({"letter": ["x"]}))
    with pytest.raises(ValueError, match="too many values"):
        runner._unpack(pa.concat_tables(pieces))


def test_tasks_may_share_values_and_return_several() -> None:
    for engine in (Runner(), InProcess()):
        shared = engine.put([1, 2, 3])
        halves = engine.submit(divmod, 7, 2, returns=2)
        assert engine.get(engine.submit(sum, shared)) == 6 and engine.get(halves[1]) == 1
        assert list(engine.get(list(halves))) == [3, 1]


def test_both_runners_write_the_same_nights(tag_with: Callable[..., str], tmp_path: Path) -> None:
    """Rows that are good, bad, repeated, too long; then the next night, which reuses most of it."""
    rows: list[dict[str, Any]] = [document(n) for n in range(300)]
    rows[20:20] = [{"id": "d7", "text": "again"}, {"id": "null", "text": None}, {"id": "long", "text": "red apple " * 200}]
    catalogue = write(tmp_path / "in" / "a.parquet", rows)
    settings = {"max_reject_share": 0.1, "commit_rows": 60, "target_bytes": 4000, "pool__max": 2}
    runners = {"ray": Runner(), "here": InProcess()}
    first = {name: tag_with(each, tmp_path / "in", output=tmp_path / name, **settings) for name, each in runners.items()}
    write(catalogue, [*rows[::-1][:280], {"id": "new", "text": "a green pear"}, {"id": "new", "text": "again"}])
    next_night = {"date": "2026-11-24", "previous": "last"} | settings
    second = {name: tag_with(each, tmp_path / "in", output=tmp_path / name, **next_night) for name, each in runners.items()}
    for nights in (first, second):
        names, tables, manifests = zip(*map(outcome, nights.values()), strict=True)
        assert names[0] == names[1] and len(names[0]) > 4
        assert all(one.equals(other) for one, other in zip(*tables, strict=True))
        assert manifests[0] == manifests[1]
    assert manifests[0]["reused"] > 200 and manifests[0]["rejected"] == 1


def outcome(folder: str) -> tuple[list[str], list[pa.Table], dict[str, Any]]:
    """The files of a night without its run's name, what they hold, and the manifest without run, times and addresses."""
    manifest = manifest_of(folder)
    names = [*manifest["files"], *manifest["rejects"], *manifest["changes"]]
    places = [*files_named(folder, manifest).values(), join(folder, "label-counts.parquet")]
    tables = [pq.read_table(place, partitioning=None) for place in places]
    for name in ("rows", "sizes"):
        manifest[name] = list(manifest[name].values())
    for name in (
        "run",
        "started",
        "ended",
        "documents_per_second",
        "config",
        "previous",
        "files",
        "rejects",
        "changes",
        "changes_since",
    ):
        del manifest[name]
    return [name.split("-")[-1] for name in names], tables, manifest


def test_on_object_storage(
    tag: Callable[..., str], tag_with: Callable[..., str], trained: Path, s3: S3, tmp_path: Path
) -> None:
    """A catalogue among 2,500 objects, three pages of a list: a night by Ray, the next one, and that one again."""
    folders.upload(trained / "bundle", s3.uri("bundles/fruit"), last="config.json")
    filesystem, path = storage.arrow_filesystem(s3.uri("catalogue"))

    def put(number: int) -> None:
        folder = f"{number % 7}" if number < 200 else "_others"
        with filesystem.open_output_stream(f"{path}/{folder}/{number:05}.jsonl") as stream:
            stream.write("".join(json.dumps(document(n)) + "\n" for n in range(3 * number, 3 * number + 3)).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(2_500)))
    settings = {"bundle": s3.uri("bundles/fruit"), "output": s3.uri("tags")}
    first = tag_with(Runner(), s3.uri("catalogue"), date="2026-01-02", **settings)
    assert manifest_of(first)["tagged"] == manifest_of(first)["in"] == 3 * len(manifest_of(first)["input"]) == 600
    assert sorted(read_night(first)[0]["id"].to_pylist()) == sorted(f"d{n}" for n in range(600))
    storage.write_bytes(s3.uri("catalogue/0/00000.jsonl"), json.dumps({"id": "d0", "text": "a green plum"}).encode())
    second = tag(s3.uri("catalogue"), "--previous=last", date="2026-01-03", **settings)
    assert [manifest_of(second)[name] for name in ("tagged", "reused")] == [1, 597]
    assert tag(s3.uri("catalogue"), date="2026-01-03", previous="last", **settings) == second
    replaced = tag(s3.uri("catalogue"), "--overwrite", date="2026-01-03", **settings)
    manifest = manifest_of(replaced)
    assert manifest["tagged"] == 598 and manifest["changes_since"]["night"] == first
    below = {
        name: {file.uri.removeprefix(f"{name}/") for file in storage.all_files(name)}
        for name in (replaced, tags_folder(replaced))
    }
    assert list(below.values()) == [{*manifest["changes"], *OTHERS}, {*manifest["files"]}]
    assert latest(s3.uri("tags")) == replaced


OTHERS = {"manifest.json", "report.html", "run.json", "label-counts.parquet", "_SUCCESS"}


OTHERS = {"manifest.json", "report.html", "run.json", "label-counts.parquet", "_SUCCESS"}


def test_a_bucket_that_may_not_be_written_and_wrong_keys(
    tag: Callable[..., str], s3: S3, fruit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(s3.uri("readable/test.parquet"), (fruit / "test.parquet").read_bytes())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret_key)
    with pytest.raises(
        ConfigError, match=r"cannot be read or written: \S+/forbidden/_nights/dt=2026-11-23;.*check AWS_ACCESS_KEY_ID"
    ) as refused:
        tag(s3.uri("readable"), output=s3.uri("forbidden"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(ConfigError, match=r"cannot be read or written.*check AWS_ACCESS_KEY_ID") as wrong:
        tag(s3.uri("readable"))
    for error in (refused, wrong):
        assert not any(secret in str(error.value) for secret in ("not-the-secret", s3.reader_secret_key, s3.secret_key))
        assert "\n" not in str(error.value)


def test_a_machine_of_its_own_is_kept_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Ray of `ray_session` has six CPUs, whatever the machine has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = {1: (1, 1), 2: (2, 1), 3: (2, 1), 4: (2, 2)}
    for count, expected in cores.items():
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=count: range(count))
        pool = PoolConfig().settled()
        assert (pool.max, pool.threads_each) == expected
    assert PoolConfig(min=3).settled().max == 3 and PoolConfig(max=1).settled().max == 1
    assert PoolConfig(gpu=True).settled().max == 1, "none is there, which is told later"
    assert PoolConfig(threads=4).settled().max == 1
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert PoolConfig().settled().max == 1

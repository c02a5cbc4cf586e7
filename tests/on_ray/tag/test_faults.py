"""Tagging under kill -9 and worse: every id comes out once, and the night is the same as an undisturbed one.

A latch holds the model, so that each fault comes while pieces are under way.

The table in docs/operations.md names the test of each fault.
"""

import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from faults import SECONDS, children, kill, running, submit, wait_for
from fruit import document, read_night
from in_process import InProcess
from latch import Latch
from seaweed import S3

from xmc_ray import command, storage
from xmc_ray.on_ray.tag import job, runner
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.storage import folders

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS, COMMIT_ROWS = 6_000, 600
REPEATED = 30  # further rows, whose ids were there before


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    for part in range(3):
        rows = [document(n) for n in range(part, ROWS, 3)]
        for number in range(REPEATED // 3):  # so that most pieces have rejects
            rows.insert(201 * (number + 1) - 1, {"id": rows[number]["id"], "text": "a red plum"})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet", row_group_size=700)
    return folder


@pytest.fixture(scope="module")
def arguments(trained: Path, catalogue: Path) -> Callable[[object], list[str]]:
    settings = {"documents.uri": catalogue, "bundle": trained / "bundle", "date": "2026-11-23", "k": 3}
    settings |= {"commit_rows": COMMIT_ROWS, "pool.threads": 1, "pool.max": 2, "pool.min": 2, "model.precision": "float32"}
    return lambda output: [*(f"--{name}={value}" for name, value in settings.items()), f"--output={output}"]


@pytest.fixture(scope="module")
def undisturbed(arguments: Callable[[object], list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tags by id of an undisturbed night, computed without Ray, and its rejects."""
    return night(job.tag(parse(arguments(tmp_path_factory.mktemp("undisturbed"))), InProcess()))


@pytest.fixture
def latch(tmp_path: Path) -> Iterator[Latch]:
    """Open at the end, so that no process waits for a test that has failed."""
    latch = Latch(tmp_path / "latch").let(0)
    yield latch
    latch.open()


def parse(arguments: list[str]) -> TagConfig:
    return command.parse(TagConfig, arguments)


def night(folder: object) -> dict[str, Any]:
    tags, rejects = read_night(folder)
    ids = tags["id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS and len(rejects) == REPEATED
    assert not storage.exists(storage.join(str(folder), "_work", "run.json"))
    by_id = {row.pop("id"): row for row in tags.to_pylist()}
    return {"tags": by_id, "rejects": sorted(rejects.to_pylist(), key=str)}


def pieces(output: object) -> set[str]:
    """The pieces that are done; none once the night is finished."""
    return {path.name for path in Path(str(output)).glob("_nights/dt=*/_work/pieces/[!.]*")}


def processes(stage: str) -> list[int]:
    """Ray's processes that work on a stage now."""
    return children(f"ray::MapBatches({stage}") + children(f"ray::MapWorker(MapBatches({stage}")


def held_job(latch: Latch, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    """The job as a user starts it, but with a model that the latch holds."""
    return submit("../tests/support/latch", [str(latch.folder), *arguments], **environment)


SLOW = pytest.mark.slow
STAGES = [
    pytest.param("ReadPieces", "PieceReader", 0, marks=SLOW),
    ("TagPieces", "load_predictor", 3),
    pytest.param("WritePieces", "PieceWriter", 3, marks=SLOW),
]


@pytest.mark.parametrize(("stage", "step", "after"), STAGES)
def test_a_process_of_each_stage_is_killed(
    stage: str,
    step: str,
    after: int,
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    latch: Latch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, step, latch.let(after).hold(getattr(job, step)))
    with running(lambda: job.tag(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: len(pieces(tmp_path)) >= after, outcome)
        wait_for(lambda: latch.waiting(), outcome)
        wait_for(lambda: kill(processes(stage)[:1]), outcome)
        latch.open()
    assert night(outcome["result"]) == undisturbed


def test_ctrl_c_ends_a_night_with_one_line_and_it_is_resumed(
    arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], latch: Latch, tmp_path: Path
) -> None:
    """Ray has ended, the folder is not held, and what is there is not a night."""
    first = held_job(latch.let(3), arguments(tmp_path))
    wait_for(lambda: latch.waiting() and pieces(tmp_path))
    own = children("", of=first.pid)
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=SECONDS)[0]
    assert first.returncode == 130 and "Traceback" not in output, output
    assert output.splitlines()[-1] == "error: ended by SIGINT; the same command resumes, or starts over"
    assert {path.name for path in (tmp_path / "_nights" / "dt=2026-11-23").iterdir()} == {"_work"}
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own))
    assert night(job.tag(parse(arguments(tmp_path)), InProcess())) == undisturbed


@SLOW
def test_a_write_is_killed_between_its_two_files(
    arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Rejects are written, the file that completes the piece is not."""
    work = tmp_path / "_nights" / "dt=2026-11-23" / "_work"

    def half_done() -> bool:
        rejects = {path.name for path in (work / "rejects").glob("[!.]*")}
        return bool(rejects - pieces(tmp_path)) and kill(processes("WritePieces"))

    with running(lambda: job.tag(parse(arguments(tmp_path)))) as outcome:
        wait_for(half_done, outcome, every=0.002)  # the moment is short
    assert night(outcome["result"]) == undisturbed


@SLOW
def test_a_kill_costs_an_actor_no_more_than_it_may(
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    latch: Latch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All actors and all writers at once: rows that are tagged a second time."""
    begun = tmp_path / "begun"

    class Watched(runner.TagPieces):
        def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
            with begun.open("a") as file:
                file.writelines(f"{number}\n" for number in packed["piece"].to_pylist())
            return super().__call__(packed)

    monkeypatch.setattr(runner, "TagPieces", Watched)
    monkeypatch.setattr(job, "load_predictor", latch.let(8).hold(job.load_predictor))
    with running(lambda: job.tag(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: len(pieces(tmp_path)) >= 8 and latch.waiting(), outcome)
        kill(processes("Watched") + processes("WritePieces"))
        latch.open()
    assert night(outcome["result"]) == undisturbed
    tagged = Counter(begun.read_text().split())
    again = sum(tagged.values()) - len(tagged)
    assert again >= 1 and again * COMMIT_ROWS / 2 <= 2 * COMMIT_ROWS, "of two actors"


def test_the_driver_is_killed_and_the_same_command_goes_on(
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    latch: Latch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Finished pieces stay, to the byte. The second attempt has the Ray of the session: starting one proves nothing here."""
    first = held_job(latch.let(6), arguments(tmp_path))
    wait_for(lambda: len(pieces(tmp_path)) >= 6 or first.poll() is not None)
    orphans = children("ray::", of=first.pid)
    first.kill()
    first.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
    work = tmp_path / "_nights" / "dt=2026-11-23" / "_work"
    done = {name: (work / "pieces" / name).stat().st_mtime_ns for name in pieces(tmp_path)}
    rows = sum(pq.read_metadata(work / "pieces" / name).num_rows for name in done)

    latch.passed.unlink()
    monkeypatch.setattr(job, "load_predictor", latch.let(1).hold(job.load_predictor))
    with running(lambda: job.tag(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: len(pieces(tmp_path)) > len(done), outcome)
        kept = {name: (work / "pieces" / name).stat().st_mtime_ns for name in done}
        latch.open()
    assert kept == done
    resumed_after = re.search(r"resuming after ([\d,]+) of", capsys.readouterr().out)
    assert resumed_after and int(resumed_after[1].replace(",", "")) >= rows, "rejects are among these documents"
    assert night(outcome["result"]) == undisturbed
    third = submit("tag", arguments(tmp_path))
    assert "nothing to do" in third.communicate(timeout=SECONDS)[0] and third.returncode == 0


@SLOW
def test_kills_at_random(
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    latch: Latch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten of them, of whatever works at the moment, while a piece is tagged after each."""
    rng = random.Random(6088)
    killed = 0
    monkeypatch.setattr(job, "load_predictor", latch.let(1).hold(job.load_predictor))
    with running(lambda: job.tag(parse(arguments(tmp_path)))) as outcome:
        wait_for(lambda: pieces(tmp_path), outcome)
        while killed < 10 and not outcome:
            time.sleep(rng.uniform(0.05, 0.5))
            working = [pid for stage in ("ReadPieces", "TagPieces", "WritePieces") for pid in processes(stage)]
            killed += kill(rng.sample(working, 1)) if working else 0
            latch.let(1 + killed)
        latch.open()
    assert killed == 10
    assert night(outcome["result"]) == undisturbed


@SLOW
def test_a_node_of_a_cluster_is_killed(
    arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], latch: Latch, tmp_path: Path
) -> None:
    """Two nodes with an actor each; one node dies with all that it holds, another comes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=3)
        job = held_job(latch.let(4), arguments(tmp_path), RAY_ADDRESS=cluster.address)
        wait_for(lambda: len(pieces(tmp_path)) >= 4 or job.poll() is not None)
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=3)
        latch.open()
        output = job.communicate(timeout=SECONDS)[0]
        assert job.returncode == 0, output
    finally:
        cluster.shutdown()
    assert night(tmp_path / "_nights" / "dt=2026-11-23") == undisturbed


@SLOW
def test_the_disk_is_full(arguments: Callable[[object], list[str]], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """On a file system of its own, in name spaces of its own, that is made larger for the second attempt."""
    small, large = "mount -t tmpfs -o size=200k tmpfs small", "mount -o remount,size=50m small"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    (tmp_path / "small").mkdir()
    if subprocess.run([*inside, small], cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    job = " ".join([sys.executable, str(ROOT / "jobs" / "tag.py"), *map(shlex.quote, arguments(tmp_path / "small"))])
    script = f"{small} && {{ {job}; echo exit $?; {large} && {job}; echo exit $?; cp -r small large; }}"
    found = subprocess.run([*inside, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=SECONDS)
    first, second = found.stdout.split("exit")[0:2], found.stdout.split("exit")[2]
    assert re.search(r"error: cannot be read or written: \S+\.parquet; .*No space left on device", found.stderr), found.stderr
    assert first[1].startswith(" 2") and "resuming after" in first[1] and second.startswith(" 0"), found.stdout
    assert night(tmp_path / "large" / "_nights" / "dt=2026-11-23") == undisturbed


@SLOW
def test_storage_is_away_for_twenty_seconds(
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    catalogue: Path,
    trained: Path,
    s3: S3,
    latch: Latch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Input, model and output lie there; documents are half read."""
    settings = on_storage(arguments, catalogue, trained, s3, "away")
    monkeypatch.setattr(job, "load_predictor", latch.let(3).hold(job.load_predictor))
    with running(lambda: job.tag(parse(settings))) as outcome:
        wait_for(lambda: len(done_on_storage(s3, "away")) >= 3, outcome)
        s3.stop()
        latch.open()
        time.sleep(20)
        s3.start()
    assert without_addresses(night(outcome["result"])) == without_addresses(undisturbed)


@SLOW
def test_storage_answers_503_for_a_while(
    arguments: Callable[[object], list[str]],
    undisturbed: dict[str, Any],
    catalogue: Path,
    trained: Path,
    s3: S3,
    latch: Latch,
) -> None:
    settings = on_storage(arguments, catalogue, trained, s3, "overloaded")
    with overloaded(s3) as (endpoint, busy):
        job = held_job(latch.let(3), settings, AWS_ENDPOINT_URL=endpoint)
        wait_for(lambda: len(done_on_storage(s3, "overloaded")) >= 3 or job.poll() is not None)
        busy.set()
        latch.open()
        time.sleep(20)
        busy.clear()
        output = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, output
    assert without_addresses(night(s3.uri("overloaded/out/_nights/dt=2026-11-23"))) == without_addresses(undisturbed)


def on_storage(arguments: Callable[[object], list[str]], catalogue: Path, trained: Path, s3: S3, name: str) -> list[str]:
    """The options of a job that has everything on S3, below ``name``."""
    folders.upload(catalogue, s3.uri(f"{name}/in"))
    folders.upload(trained / "bundle", s3.uri(f"{name}/bundle"), last="config.json")
    places = [f"--documents.uri={s3.uri(f'{name}/in')}", f"--bundle={s3.uri(f'{name}/bundle')}"]
    return [*arguments(s3.uri(f"{name}/out")), *places]


def done_on_storage(s3: S3, name: str) -> list[str]:
    return [file.uri for file in storage.all_files(s3.uri(f"{name}/out")) if "/_work/pieces/" in file.uri]


def without_addresses(outcome: dict[str, Any]) -> dict[str, Any]:
    """A night, without the addresses of its input."""
    rejects = [(Path(row["file"]).name, row["row"], row["id"]) for row in outcome["rejects"]]
    return {"tags": outcome["tags"], "rejects": sorted(rejects)}


@contextmanager
def overloaded(s3: S3) -> Iterator[tuple[str, threading.Event]]:
    """The endpoint of a server that hands all on to the real one, and the switch that makes it answer 503 to everything."""
    busy = threading.Event()
    host = s3.endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if busy.is_set():
                status, headers, content = 503, [], b"<Error><Code>SlowDown</Code></Error>"
            else:
                connection = HTTPConnection(host, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                status, headers, content = answer.status, answer.getheaders(), answer.read()
                connection.close()
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            length = dict(headers).get("Content-Length", len(content)) if is_head else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if not is_head:
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", busy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

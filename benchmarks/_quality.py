"""What the benchmarks of quality share: methods, runs that are kept, and one score for all of them.

A method is a command that reads a data folder and leaves ``predictions.parquet`` (``labels``, ``scores``: ten a row of
test.parquet) and ``costs.json`` in a folder. It runs in a process of its own, whose memory is watched from outside, together
with that of all its children. ``run.json`` is written last: a folder that has it is finished and not run again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray.labels import IntArray, LabelIndex
from xmc_ray.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS, RESULTS = ROOT / "runs" / "peers", ROOT / "runs" / "peers-results"
DEPTH = 10
_LOOKS = 1.0  # seconds between two looks at the memory


@dataclass(frozen=True)
class Method:
    """A row of the table: ``script`` DATA OUT ``options``, run by the Python of ``environment`` (None: this one)."""

    name: str
    script: Path
    options: tuple[str, ...] = ()
    environment: str | None = None

    @property
    def is_peer(self) -> bool:
        return self.environment is not None


def peers(encoder: str) -> list[Method]:
    """All peers, the quickest first; ``encoder`` is the folder of the one that XR-Transformer trains."""
    scripts = {
        "omikuji-parabel": ("omikuji", "run_omikuji.py", "--mode=parabel"),
        "omikuji-bonsai": ("omikuji", "run_omikuji.py", "--mode=bonsai"),
        "xr-linear": ("pecos", "run_xrlinear.py"),
        "napkinxc-plt": ("napkinxc", "run_napkinxc.py"),
        "libmultilabel-tree": ("libmultilabel", "run_libmultilabel.py"),
        "xr-transformer": ("pecos", "run_xrtransformer.py", f"--encoder={encoder}"),
    }
    return [Method(name, PEERS / file, tuple(more), place) for name, (place, file, *more) in scripts.items()]


def interpreter(name: str, environments: Path) -> Path:
    """The Python of a peer's own virtual environment, which is made on first use from ``peers/<name>.txt``."""
    wanted, folder = PEERS / f"{name}.txt", environments / name
    ready, python = folder / "requirements.txt", folder / "bin" / "python"
    if not ready.exists() or ready.read_text() != wanted.read_text():
        print(f"making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", wanted], check=True)
        shutil.copyfile(wanted, ready)
    return python


def run(method: Method, data: Path, out: Path, environments: Path = ENVIRONMENTS, minutes: float | None = None) -> bool:
    """Run ``method`` unless ``out`` holds a finished run of the same command; False if it failed or took too long."""
    command = [part.replace(f"{ROOT}/", "") for part in (str(method.script), *method.options)]  # the same in any checkout
    finished = out / "run.json"
    if finished.exists() and json.loads(finished.read_text())["command"] == command:
        return True
    python = Path(sys.executable) if method.environment is None else interpreter(method.environment, environments)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    print(f"{data.name}: {method.name}", flush=True)
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen([python, method.script, data, out, *method.options], stdout=log, stderr=log)
        watched = _watch(process, None if minutes is None else 60 * minutes)
    if process.returncode:
        print(f"{data.name}: {method.name} ended with {process.returncode}, see {out / 'log.txt'}", flush=True)
        return False
    costs = json.loads((out / "costs.json").read_text())
    finished.write_text(json.dumps({"command": command, **costs, **watched}, indent=1) + "\n")
    return True


def score(data: Path, out: Path) -> dict[str, Any]:
    """``Metrics.result`` of a finished run, with propensities and bands by the labels of the whole training split."""
    index = LabelIndex.count(pq.read_table(data / "train.parquet", columns=["labels"])["labels"].chunks)
    truth = index.encode(pq.read_table(data / "test.parquet", columns=["labels"])["labels"].combine_chunks())
    ranked = pq.read_table(out / "predictions.parquet", columns=["labels"])["labels"].combine_chunks()
    metrics = Metrics.empty(index.counts, index.n_documents)
    metrics.update(ranking(ranked, index), *(np.asarray(part, np.int64) for part in (truth.offsets, truth.values)))
    return metrics.result()


def ranking(lists: pa.ListArray, index: LabelIndex) -> IntArray:
    """int64[D, 10]: the ids of each row's first labels in their order, then -1; a label that the index lacks is -1 as well."""
    lists = pc.list_slice(lists, 0, DEPTH)
    rows = pc.list_parent_indices(lists).to_numpy()
    ids = pc.fill_null(pc.index_in(pc.list_flatten(lists), value_set=index.labels), -1).to_numpy()
    ids_DK = np.full((len(lists), DEPTH), -1, np.int64)
    ids_DK[rows, np.arange(len(rows)) - np.searchsorted(rows, rows)] = ids
    return ids_DK


def _watch(process: "subprocess.Popen[bytes]", seconds: float | None) -> dict[str, float]:
    """What the process and its descendants took: ``peak_bytes`` at one time, ``cpu_seconds``. Stopped after ``seconds``."""
    started, peak = time.monotonic(), 0
    ticks: dict[int, int] = {}
    try:
        while process.poll() is None:
            family = list(_family(process.pid))
            peak = max(peak, sum(_held(pid) for pid in family))
            ticks |= {pid: _ticks(pid) or ticks.get(pid, 0) for pid in family}
            if seconds is not None and time.monotonic() - started > seconds:
                _end(family)
            time.sleep(_LOOKS)
    finally:
        _end(_family(process.pid) if process.poll() is None else ())
    return {"peak_bytes": peak, "cpu_seconds": sum(ticks.values()) / os.sysconf("SC_CLK_TCK")}


def _family(pid: int) -> Iterator[int]:
    """``pid`` and its descendants."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(_fields(stat)[1])
        except OSError:
            continue  # it has ended
        children[parent].append(int(stat.parent.name))
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children[one]


def _fields(stat: Path) -> list[str]:
    """What /proc/<pid>/stat tells after the name of the process, which may hold anything; the state comes first."""
    return stat.read_text().rpartition(")")[2].split()


def _ticks(pid: int) -> int:
    """Processor time so far, 0 if the process has ended."""
    try:
        return sum(map(int, _fields(Path(f"/proc/{pid}/stat"))[11:13]))
    except OSError:
        return 0


def _held(pid: int) -> int:
    """Bytes of memory, with a fair share of what processes have in common (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _end(family: Iterable[int]) -> None:
    for pid in reversed(list(family)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def collect(data: Path, results: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metrics and costs of the finished ones of ``names``, which are folders in ``results``."""
    done = [name for name in names if (results / name / "run.json").exists()]
    costs = {name: json.loads((results / name / "run.json").read_text()) for name in done}
    return {name: score(data, results / name) | {"costs": costs[name]} for name in done}

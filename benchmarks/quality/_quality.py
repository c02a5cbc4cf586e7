"""What the benchmarks of quality share: methods, runs that are kept, and one score for all of them.

A method is a command that reads a data folder and leaves ``predictions.parquet`` (``labels``, ``scores``: ten a row of
test.parquet) and ``costs.json`` in a folder. It runs in a process of its own, whose memory is watched from outside, together
with that of all its children. ``run.json`` is written last, with the costs or the ``failure``: what is finished is not run
again, nor what took too long, unless it gets longer, or the script, its recipe, its releases or the data have changed. It also
names the machine and, for our own methods, has a digest of the library: a benchmark says whether another one counts as well.
"""

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.metrics.at_k import Metrics

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "xmc_ray"
PEERS = ROOT / "benchmarks" / "peers"
ENVIRONMENTS = ROOT / "runs" / "peers"
DEPTH = 10
_STRETCH, _FIRST = 100, 6  # documents, and words that a text begins with
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin for each other stand still where anything else runs
_LOOKS = 3.0  # seconds between two looks at the memory, which cost the more the larger it is


@dataclass(frozen=True)
class Method:
    """A row of the table: ``script`` DATA OUT ``options``, run by the Python of ``environment`` (None: this one).

    ``members``: the methods whose models, in folders beside OUT, it makes use of.
    """

    name: str
    script: Path
    options: tuple[str, ...] = ()
    environment: str | None = None
    members: tuple[str, ...] = ()


def peers(encoder: str) -> list[Method]:
    """All peers, the quickest first; ``encoder`` is the folder of the one that XR-Transformer trains.

    The stronger ones are there twice: with all terms, and, ending in ``-df2``, without those of a single document.
    """
    scripts = {
        "omikuji-parabel": ("omikuji", "run_omikuji.py", "--mode=parabel"),
        "omikuji-bonsai": ("omikuji", "run_omikuji.py", "--mode=bonsai"),
        "xr-linear": ("pecos", "run_xrlinear.py"),
        "napkinxc-plt": ("napkinxc", "run_napkinxc.py"),
        "linear-svc": ("libmultilabel", "run_linearsvc.py"),
        "libmultilabel-tree": ("libmultilabel", "run_libmultilabel.py"),
        "xr-transformer": ("pecos", "run_xrtransformer.py", f"--encoder={encoder}"),
    }
    return [
        Method(f"{name}{ending}", PEERS / file, (*more, *rarest), place)
        for name, (place, file, *more) in scripts.items()
        for ending, rarest in (("", ()), ("-df2", ("--rarest=2",)))[: 1 if name in ("napkinxc-plt", "xr-transformer") else 2]
    ]


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


def run(
    method: Method,
    data: Path,
    out: Path,
    environments: Path = ENVIRONMENTS,
    minutes: float | None = None,
    same: Sequence[str] = (),
) -> bool:
    """Run ``method`` unless the same command has finished, or took too long, in ``out``; False if it failed or takes too long.

    What makes use of others' models is run again when one of these is newer, and everything where `stands` says so.
    """
    newest = max((_told(out.parent / name).get("date", "") for name in method.members), default="")
    before = _told(out)
    if stands(before, method, data, minutes, same) and before.get("date", "") >= newest:
        return "failure" not in before
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    print(f"{out.parent.name}: {method.name}", flush=True)
    about = made_of(method, data)
    found = _costs(method, data, out, environments, minutes)
    if made_of(method, data) != about:
        found = {"failure": "ran while what it is made of changed"}
    if "failure" in found:
        print(f"{out.parent.name}: {method.name} {found['failure']}, see {out / 'log.txt'}", flush=True)
    about |= {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    (out / "run.json").write_text(json.dumps(about | found, indent=1) + "\n")
    return "failure" not in found


def stands(told: dict[str, Any], method: Method, data: Path, minutes: float | None = None, same: Sequence[str] = ()) -> bool:
    """Whether what is ``told`` of a run is of ``method`` as it is now, and of one that ended, or took ``minutes`` and more.

    ``same``: what else has to be as it is now, of ``library`` and ``machine``.
    """
    now = made_of(method, data)
    is_same = all(told.get(name) == now[name] for name in ("command", "source", *same))
    return is_same and ("failure" not in told or told.get("minutes", 0.0) >= (float("inf") if minutes is None else minutes))


def made_of(method: Method, data: Path) -> dict[str, Any]:
    """What a run of ``method`` is made of here and now; a peer makes no use of the library."""
    library_ = library() if method.environment is None else None
    return {"command": _command(method), "source": _source(method, data), "library": library_, "machine": machine()}


def library() -> str:
    """A digest of the library's sources."""
    files = sorted(path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    named = (str(file.relative_to(LIBRARY)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(b"".join(named)).hexdigest()[:16]


def machine() -> str:
    """The processor's model, and how many cores this process may use."""
    told = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", told.read_text() if told.exists() else "", re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    return f"{models[0] if models else platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}"


def _command(method: Method) -> list[str]:
    """The same in any checkout, wherever the encoder lies."""
    return [method.script.name, *(re.sub(r"=/.*/", "=", part) for part in method.options)]


def _costs(method: Method, data: Path, out: Path, environments: Path, minutes: float | None) -> dict[str, Any]:
    """Run ``method``: its costs, with those that its ``costs.json`` tells of others' models; or its ``failure``."""
    with (out / "log.txt").open("w") as log:
        try:
            python = Path(sys.executable) if method.environment is None else interpreter(method.environment, environments)
        except subprocess.CalledProcessError as error:
            log.write(f"{error}\n")
            return {"failure": "has no environment"}
        variables = os.environ | _PATIENT | ({"PYTHONPATH": str(ROOT)} if method.environment is None else {})
        before = _ended_seconds()
        process = subprocess.Popen([python, method.script, data, out, *method.options], stdout=log, stderr=log, env=variables)
        peak, seconds, in_time = watched(process, None if minutes is None else 60 * minutes)
    if not in_time:
        return {"failure": f"stopped after {minutes:g} minutes", "minutes": minutes}
    if process.returncode:
        return {"failure": f"failed with status {process.returncode}"}
    costs: dict[str, Any] = json.loads((out / "costs.json").read_text())
    seconds = max(seconds, _ended_seconds() - before) + costs.get("cpu_seconds", 0)
    peak = max(peak, costs.get("peak_bytes", 0))
    return costs | {"peak_bytes": peak, "cpu_seconds": seconds}


def _source(method: Method, data: Path) -> str:
    """A digest of the script, its recipe or its releases, and of the data: a run with others is not the same."""
    files = [method.script, *(ROOT / part.removeprefix("--config=") for part in method.options if part.startswith("--config="))]
    if method.environment is not None:
        files += [PEERS / "_peer.py", PEERS / f"{method.environment}.txt"]
    files += [data / f"{split}.parquet" for split in ("train", "test")]
    return hashlib.sha256(b"".join(map(_content, files))).hexdigest()[:16]


def _content(file: Path) -> bytes:
    """Of a file, if there is one; of recipes and releases without the comments, which tell what a run found."""
    content = file.read_bytes() if file.exists() else b""
    if file.suffix not in (".toml", ".txt"):
        return content
    return b"\n".join(line for line in content.splitlines() if not line.startswith(b"#"))


def _commit() -> str:
    """The state of this checkout; a + stands for changes that nobody has committed."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _told(out: Path) -> dict[str, Any]:
    """``run.json``, empty if the run is not over."""
    file = out / "run.json"
    told: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return told


def fresh(data: Path, folder: Path) -> Path:
    """``folder``, with a data set made of the training split of ``data`` alone: of every tenth stretch of it, the test split.

    Rows lie in the order of their source, where neighbours often say nearly the same. A document of these stretches that begins
    like one of the others is in neither split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(data / "train.parquet")
    starts = (re.findall(r"\w+", text.lower())[:_FIRST] for text in rows["text"].to_pylist())
    start_D = np.array([" ".join(words) for words in starts])
    is_train = np.arange(len(rows)) // _STRETCH % 10 != 9
    for split, is_in in {"train": is_train, "test": ~np.isin(start_D, start_D[is_train])}.items():
        pq.write_table(rows.filter(pa.array(is_in)), folder / f"{split}.parquet")
    if (data / "labels.parquet").exists():
        shutil.copyfile(data / "labels.parquet", folder / "labels.parquet")
    return folder


def score(data: Path, out: Path) -> dict[str, Any]:
    """``Metrics.result`` of a finished run, with propensities and bands by the labels of the whole training split."""
    index = labels_of(data)
    ranked = pq.read_table(out / "predictions.parquet", columns=["labels"])["labels"].combine_chunks()
    return score_ranking(data, index, ranking(ranked, index))


def labels_of(data: Path) -> LabelIndex:
    """The labels of the whole training split."""
    return LabelIndex.count(pq.read_table(data / "train.parquet", columns=["labels"])["labels"].chunks)


def score_ranking(data: Path, index: LabelIndex, ids_DK: IntArray) -> dict[str, Any]:
    """``Metrics.result`` of what is predicted for the test split: ids of ``index``, best first, -1 where there are no more."""
    truth = index.encode(pq.read_table(data / "test.parquet", columns=["labels"])["labels"].combine_chunks())
    metrics = Metrics(index.counts, index.n_documents)
    metrics.update(ids_DK, truth)
    return metrics.result()


def ranking(lists: pa.ListArray, index: LabelIndex) -> IntArray:
    """int64[D, 10]: the ids of each row's first labels in their order, then -1; a label that the index lacks is -1 as well."""
    lists = pc.list_slice(lists, 0, DEPTH)
    rows = pc.list_parent_indices(lists).to_numpy()
    ids = pc.fill_null(pc.index_in(pc.list_flatten(lists), value_set=index.labels), -1).to_numpy()
    ids_DK = np.full((len(lists), DEPTH), -1, np.int64)
    ids_DK[rows, np.arange(len(rows)) - np.searchsorted(rows, rows)] = ids
    return ids_DK


def watched(process: "subprocess.Popen[bytes]", seconds: float | None) -> tuple[int, float, bool]:
    """Most bytes at one time and CPU seconds of the process and its descendants; False if it was stopped after ``seconds``."""
    started, peak, in_time = time.monotonic(), 0, True
    ticks: dict[int, int] = {}
    try:
        while process.poll() is None:
            family = list(_family(process.pid))
            peak = max(peak, sum(_held(pid) for pid in family))
            ticks |= {pid: _ticks(pid) or ticks.get(pid, 0) for pid in family}
            if seconds is not None and time.monotonic() - started > seconds:
                in_time = False
                _end(family)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOKS)
    finally:
        _end(_family(process.pid) if process.poll() is None else ())
    return peak, sum(ticks.values()) / os.sysconf("SC_CLK_TCK"), in_time


def _ended_seconds() -> float:
    """CPU seconds of all descendants that have ended and been waited for, to the last one; Ray leaves some that never are."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
    """Metrics and ``costs``, or the ``failure``, of those of ``names``, which are folders in ``results``, that are over."""
    told = {name: _told(results / name) for name in names}
    return {
        name: one if "failure" in one else score(data, results / name) | {"costs": one} for name, one in told.items() if one
    }

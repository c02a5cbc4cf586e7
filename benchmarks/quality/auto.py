"""Documents and minutes in, a model out: the tuning job by its defaults against the linear peers, on the same splits.

    make bench NAME=auto ARGS="--sets debian-tags --minutes 20"
    make bench NAME=auto ARGS="--peers-only"

Ours is `jobs/tune.py --minutes 20` on the training split, as any user runs it: it sees no test document, and holds some of its
own out to choose by. Its bundle then labels the test split. Peers are omikuji, XR-Linear and, where labels are few, a support
vector machine a label, as in `quality`; their rows in the records of `quality` and `scale` count where they are still valid.
Everything runs on two cores, one method after the other, and a row of ours is valid for one state of the library.

Short texts are made of two of the sets: ``tate-titles`` and ``debian-tags-titles`` have the same documents and labels, but of
each text only what comes before its first ". " or line break, which is the title of a work and the synopsis of a package.

Bar: ahead of the best peer's P@1, P@3, P@5 and PSP@5 on every set. CPU s and peak memory are for orientation.
"""

import os
import shutil
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.inputs import minilm, require
from benchmarks.quality._quality import ROOT, Method, labels_of, peers
from benchmarks.quality._record import Benchmark, options, read
from benchmarks.quality._tables import OURS

SETS = ("tate", "debian-tags", "debian-deps", "hpo", "tate-titles", "debian-tags-titles")
LINEAR = ("omikuji", "xr-linear", "linear-svc")
FEW_LABELS, CORES, MINUTES = 1_000, 2, 20.0
_TITLES = "-titles"
_END_OF_TITLE = r"\. |\n"


def folder_of(set_: str, data: Path, made: Path) -> Path:
    """The data set ``set_``: of the folder ``data``, of the demo (hpo), or made of another's titles below ``made``."""
    if set_ == "hpo":
        folder = ROOT / "examples" / "hpo" / "data"
        if not (folder / "labels.parquet").exists():
            subprocess.run([sys.executable, ROOT / "examples" / "hpo" / "make.py", folder], check=True)
        return folder
    return titles(require(data / set_.removesuffix(_TITLES)), made / set_) if set_.endswith(_TITLES) else data / set_


def titles(data: Path, folder: Path) -> Path:
    """``folder``, with the data set ``data`` and of its texts the titles alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = pq.read_table(data / f"{split}.parquet")
        rows = rows.set_column(rows.column_names.index("text"), "text", title(rows["text"].combine_chunks()))
        pq.write_table(rows, folder / f"{split}.parquet")
    if (data / "labels.parquet").exists():
        shutil.copyfile(data / "labels.parquet", folder / "labels.parquet")
    return folder


def title(texts: pa.StringArray) -> pa.StringArray:
    """What comes before the first full stop with a space behind it, or line break; the whole text if that is nothing."""
    firsts = pc.list_element(pc.split_pattern_regex(texts, _END_OF_TITLE, max_splits=1), 0)
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(firsts), ""), texts, firsts)


def methods(data: Path, minutes: float, settings: list[str]) -> list[Method]:
    """Ours, and the linear peers that a data set of so many labels has time for."""
    ours = Method(
        f"{OURS}-auto-{minutes:g}", Path(__file__).with_name("_recipe.py"), (f"--tune-minutes={minutes:g}", *settings)
    )
    has_few = len(labels_of(data)) <= FEW_LABELS
    return [ours, *(peer for peer in peers(minilm()) if peer.name.startswith(LINEAR) and (has_few or "svc" not in peer.name))]


def main() -> None:
    parser = options(__doc__, "auto")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help=f"of {', '.join(SETS)}, or others in --data")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="that the tuning job is given; results of others than 20 are called auto-<minutes>",
    )
    parser.add_argument("--limit", type=float, default=90.0, help="minutes after which a run is ended")
    parser.add_argument("--peers-only", action="store_true", help="run no tuning job")
    given, settings = parser.parse_known_args()
    if given.peers_only:
        given.methods = list(LINEAR)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    name = "auto" if given.minutes == MINUTES else f"auto-{given.minutes:g}"  # or one record would lose the rows of the other
    benchmark = Benchmark(name=name, given=given, minutes=given.limit, same=("library",))
    folders = {set_: benchmark.folder(set_, folder_of(set_, given.data, benchmark.results / "made")) for set_ in given.sets}
    known = {set_: methods(folder, given.minutes, settings) for set_, folder in folders.items()}
    own, others = read(benchmark.record(name)), [read(benchmark.record(other)) for other in ("auto", "quality", "scale")]
    kept = own | {set_: dict(ChainMap(own.get(set_, {}), *(other.get(set_, {}) for other in others))) for set_ in folders}
    benchmark.measure(folders, known, kept)


if __name__ == "__main__":
    main()

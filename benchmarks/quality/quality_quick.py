"""Our recipe against a linear tree on two data sets, in a quarter of an hour on two cores: a short form of `quality`.

omikuji (Parabel, three trees) and our recipe are trained afresh, one after the other, and scored by the same code. Our training
stops after ``--minutes``. Bar: ahead in P@1, P@3, P@5 and PSP@5 on both data sets.
"""

import argparse
import shutil
import time
from pathlib import Path

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm, require
from benchmarks.quality._quality import ENVIRONMENTS, ROOT, collect, peers, run
from benchmarks.quality._tables import JUDGED, compared, margins, table
from benchmarks.quality.quality import recipes

RESULTS = ROOT / "runs" / "quality-quick"
SEED, LIMIT = 6088, 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--sets", nargs="+", default=["tate", "debian-tags"], help="names of data sets in it")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training of each of our models")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where the peers' virtual environments are")
    arguments, settings = parser.parse_known_args()
    started, least = time.monotonic(), float("inf")
    shutil.rmtree(RESULTS, ignore_errors=True)

    for set_ in arguments.sets:
        data = require(arguments.data / set_)
        peer = peers(minilm())[0]
        ours = recipes(set_, [SEED], [f"--loop.minutes={arguments.minutes}", *settings])[0]
        for method in (peer, ours):
            if not run(method, data, RESULTS / set_ / method.name, arguments.environments):
                raise SystemExit(f"{method.name} failed on {set_}")
        runs = collect(data, RESULTS / set_, [peer.name, ours.name])
        points = margins(runs)
        print(f"\n{set_}\n{table(runs)}\n\n{compared(runs)}\n", flush=True)
        least = min(least, *(points[name] for name in JUDGED))
    seconds = time.monotonic() - started
    figure = f"{least:+.2f} points at the worst of {', '.join(JUDGED)}, {seconds:.0f} s in all"
    verdict("quality-quick", figure, f"above 0 on every set, {LIMIT} s", least > 0 and seconds <= LIMIT)


if __name__ == "__main__":
    main()

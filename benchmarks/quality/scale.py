"""Many labels on two cores: one model of ours against omikuji's trees, and what every method costs for what it reaches.

    make bench NAME=scale
    make bench NAME=scale ARGS="--sets git-paths --methods xmc_ray omikuji-tree"

On git-paths (754,566 commit messages, 167,307 labels, its test split the newest twentieth of each project) peers are omikuji
with a single tree, with three as Parabel builds them, and as Bonsai does. On smaller sets they are those of `quality`, and so
are their rows. Ours is what `recipe = "auto"` trains by rule, without any search. All run on two cores, one after the other;
rows are kept as those of `quality`.

What is cheap for what it reaches is a table of its own, results/pareto.md, with a picture: the rows of this record and of those
of `auto` and `quality`, by CPU seconds of training and prediction. A method has no asterisk if another one is cheaper and as
good or better in P@1, P@5 and PSP@5.

Bar: on git-paths no run is missing, and ours is ahead of the best peer's P@1, P@3, P@5 and PSP@5, for at most twice the CPU
seconds of omikuji's three trees.
"""

import os
from collections import ChainMap
from pathlib import Path
from typing import Any

from benchmarks.frame import verdict
from benchmarks.inputs import minilm
from benchmarks.quality._quality import PEERS, ROOT, Method, peers
from benchmarks.quality._record import Benchmark, options, read
from benchmarks.quality._tables import COSTS, JUDGED, OURS, Runs, lacking, margins, marked, percent, sides

JUDGED_ON, CORES = "git-paths", 2
SETS = (JUDGED_ON, "debian-deps", "tate", "debian-tags")
TREES, TWICE = "omikuji-parabel", 2.0
SHOWN = ("P@1", "P@5", "PSP@5")


def methods(set_: str, settings: list[str]) -> list[Method]:
    """Ours, and on the large set omikuji's, the single tree first."""
    config = (f"--config={Path(__file__).with_name('_rule.toml').relative_to(ROOT)}", "--seed=6088")
    ours = Method(f"{OURS}-rule", Path(__file__).with_name("_recipe.py"), (*config, *settings))
    tree = Method("omikuji-tree", PEERS / "run_omikuji_tree.py", environment="omikuji")
    trees = [one for one in peers(minilm()) if one.environment == "omikuji" and not one.name.endswith("-df2")]
    return [ours, tree, *trees] if set_ == JUDGED_ON else [ours]


class Scale(Benchmark):
    """Judged by what a row costs as well."""

    def judge(self, sets: dict[str, Runs], queues: dict[str, list[Method]]) -> None:
        runs = sets.get(JUDGED_ON, {})
        faults = lacking({JUDGED_ON: runs}, {JUDGED_ON: [one.name for one in methods(JUDGED_ON, [])]})  # asked for or not
        points, (ours, others) = margins(runs), sides(runs)
        bar = f"above 0; at most {TWICE:g} times"
        print("\n".join(faults))
        if not points or TREES not in others:
            verdict(self.name, "nothing to compare yet", bar, holds=False)
            return
        least, ratio = min(points[name] for name in JUDGED), cpu_seconds(ours) / cpu_seconds(others[TREES])
        figure = f"{least:+.2f} points at the worst of {', '.join(JUDGED)}; {ratio:.2f} times the CPU seconds of three trees"
        verdict(self.name, figure, bar, holds=least > 0 and ratio <= TWICE and not faults)


def cpu_seconds(run: dict[str, Any]) -> float:
    return COSTS["CPU s"](run["costs"])


def finished(runs: Runs) -> Runs:
    """Those that have figures, the cheapest first; ensembles are left out, as their costs hold other rows'."""
    done = {name: one for name, one in runs.items() if "failure" not in one and "-ensemble" not in name}
    return dict(sorted(done.items(), key=lambda item: cpu_seconds(item[1])))


def front(runs: Runs) -> list[str]:
    """Which of them nothing else makes pointless: no other is cheaper and as good or better in all of `SHOWN`."""
    kept: list[str] = []
    for name, one in finished(runs).items():
        before = [runs[other]["total"] for other in kept]
        if not any(all(total[figure] >= one["total"][figure] for figure in SHOWN) for total in before):
            kept.append(name)
    return kept


def pareto(sets: dict[str, Runs]) -> str:
    """Markdown: a table of each data set, the cheapest method first."""
    lines = ["# What tagging costs, and what it reaches\n", "Ours are bold; * nothing cheaper is as good in all three.\n"]
    for set_, runs in sets.items():
        lines += [f"## {set_}\n", f"| method | CPU s | {' | '.join(SHOWN)} | |", f"| --- |{' ---: |' * (len(SHOWN) + 1)} --- |"]
        best = front(runs)
        for name, one in finished(runs).items():
            cells = [f"{cpu_seconds(one):,.0f}", *(percent(one["total"][figure]) for figure in SHOWN)]
            lines.append(f"| {' | '.join([marked(name), *cells, '*' if name in best else ''])} |")
        lines.append("")
    return "\n".join(lines)


def draw(sets: dict[str, Runs], file: Path) -> None:
    """The same as a picture: a row of charts for each data set, a dot for each method, a line through the best."""
    import matplotlib  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(sets)), layout="constrained")
    for row, (set_, runs) in zip(figure.subplots(len(sets), len(SHOWN), squeeze=False), sets.items(), strict=True):
        done = finished(runs)
        for axes, name in zip(row, SHOWN, strict=True):
            for is_ours, colour, marker in ((False, "tab:gray", "o"), (True, "tab:red", "D")):
                points = [
                    (cpu_seconds(one), 100 * one["total"][name])
                    for method, one in done.items()
                    if method.startswith(OURS) == is_ours
                ]
                if points:
                    axes.scatter(*zip(*points, strict=True), c=colour, marker=marker, s=24, label=OURS if is_ours else "peers")
            axes.set(xscale="log", title=f"{set_}: {name}")
            axes.grid(visible=True, alpha=0.3)
        row[0].set_ylabel("percent")
        row[0].legend(loc="lower right", fontsize="small")
    figure.supxlabel("CPU seconds of training and prediction")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xmc_ray"}):  # texts as texts, the same file every time
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, "scale")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="which of the data sets")
    parser.add_argument("--limit", type=float, default=180.0, help="minutes after which a run is ended")
    given, settings = parser.parse_known_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    benchmark = Scale(name="scale", given=given, minutes=given.limit, same=("library",))
    folders = {set_: benchmark.folder(set_, given.data / set_) for set_ in given.sets}
    record = benchmark.record("scale")
    benchmark.measure(folders, {set_: methods(set_, settings) for set_ in folders}, read(record))
    records = [read(benchmark.record(name)) for name in ("scale", "auto", "quality")]
    sets = {set_: dict(ChainMap(*(one.get(set_, {}) for one in records))) for set_ in SETS}
    sets = {set_: runs for set_, runs in sets.items() if finished(runs)}
    record.with_name("pareto.md").write_text(pareto(sets))
    draw(sets, record.with_name("pareto.svg"))


if __name__ == "__main__":
    main()

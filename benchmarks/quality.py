"""How well every peer and our recipes tag: all of them on the same splits, scored by the same code.

Peers (peers/) get TF-IDF of words and word pairs, XR-Transformer the text as well; each runs in a virtual environment of its
own, made on first use, with two threads. Ours are the recipes jobs/configs/quality-<set>*.toml, or small-cpu.toml where there
is none; with several ``--seeds``, also their ensemble. One run after the other, each in its own process; a finished run is kept
below ``--results`` and not repeated unless ``--again`` says so.

All predictions are scored by `xmc_ray.metrics`, with the frequencies of the whole training split; true labels that it lacks are
left out. Seconds depend on what else the machine does; CPU s, of all processes in training and prediction, hardly do.

The tables go to ``--output``, and after each the figures in which ours is ahead of the best peer, or behind it. "Ours" is the
recipe with the best P@1. Bar: ahead of every peer in P@1, P@3 and P@5 on every data set.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from _frame import verdict
from _quality import ENVIRONMENTS, RESULTS, ROOT, Method, collect, peers, run
from _setup import DATA, minilm, require

SETS = ("tate", "debian-tags", "debian-deps")
TOTAL = tuple(f"{name}@{k}" for name in ("P", "nDCG", "PSP") for k in (1, 3, 5))
JUDGED = ("P@1", "P@3", "P@5")
CONFIGS = ROOT / "jobs" / "configs"
OUTPUT = ROOT / "benchmarks" / "results" / "quality.md"

Runs = dict[str, dict[str, Any]]
"""A data set's finished runs: `Metrics.result` and ``costs`` of each method."""


def recipes(set_: str, seeds: list[int], settings: list[str]) -> list[Method]:
    """Our methods for a data set: each recipe with the first seed, and with all of them if there are more."""
    files = sorted(CONFIGS.glob(f"quality-{set_}*.toml")) or [CONFIGS / "small-cpu.toml"]
    groups = [seeds[:1], seeds] if len(seeds) > 1 else [seeds]
    return [
        Method(
            "xmc_ray-" + file.stem.removeprefix(f"quality-{set_}-").replace(f"quality-{set_}", "recipe") + suffix(group),
            ROOT / "benchmarks" / "_recipe.py",
            (f"--config={file.relative_to(ROOT)}", "--seeds", *map(str, group), *settings),
        )
        for file in files
        for group in groups
    ]


def suffix(seeds: list[int]) -> str:
    return f"-x{len(seeds)}" if len(seeds) > 1 else ""


def table(runs: Runs) -> str:
    """Markdown: metrics in percent, then P@5 by how often a label was seen in training, then what a run cost."""
    bands = list(next(iter(runs.values()))["bands"])
    head = ["method", *TOTAL, *(f"P@5 of {band}" for band in bands), "train s", "predict s", "CPU s", "MB", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, one in sorted(runs.items(), key=lambda item: -item[1]["total"]["P@1"]):
        costs = one["costs"]
        cells = [percent(one["total"][metric]) for metric in TOTAL] + [percent(one["bands"][band]["P@5"]) for band in bands]
        cells += [f"{costs['train_seconds']:.0f}", f"{costs['predict_seconds']:.1f}", f"{costs['cpu_seconds']:.0f}"]
        cells += [f"{costs[part] / 1e6:.0f}" for part in ("model_bytes", "peak_bytes")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def margins(ours: Runs, others: Runs) -> dict[str, float]:
    """Points by which our row with the best P@1 is ahead of the best peer, metric by metric."""
    best = max(ours.values(), key=lambda one: float(one["total"]["P@1"]))["total"]
    return {name: 100 * (best[name] - max(one["total"][name] for one in others.values())) for name in TOTAL}


def described(margins: dict[str, float]) -> str:
    """Which figures are ahead, which are behind, and by how many points."""
    ahead = ", ".join(f"{name} {points:+.2f}" for name, points in margins.items() if points > 0)
    behind = ", ".join(f"{name} {points:+.2f}" for name, points in margins.items() if points <= 0)
    return f"Ahead of the best peer: {ahead or 'nothing'}. Behind: {behind or 'nothing'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of data sets in it")
    parser.add_argument(
        "--methods", nargs="+", help="only methods whose name begins with one of these, such as omikuji xmc_ray"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[6088], help="seeds of our models; several make an ensemble too"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where finished runs are kept")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where the peers' virtual environments are")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the tables, as Markdown")
    parser.add_argument("--minutes", type=float, default=90.0, help="a run that takes longer is ended and left out")
    parser.add_argument("--again", action="store_true", help="repeat runs that are finished")
    parser.add_argument("--score", action="store_true", help="run nothing: score and compare what is finished")
    arguments, settings = parser.parse_known_args()
    wanted = tuple(arguments.methods or ("",))

    parts, points = ["# Quality of tagging, ours and the peers'\n"], {}
    for set_ in arguments.sets:
        data, results = require(arguments.data / set_), arguments.results / set_
        methods = [
            method for method in [*peers(minilm()), *recipes(set_, arguments.seeds, settings)] if method.name.startswith(wanted)
        ]
        for method in methods if not arguments.score else ():
            if arguments.again:
                shutil.rmtree(results / method.name, ignore_errors=True)
            run(method, data, results / method.name, arguments.environments, arguments.minutes)
        runs = collect(data, results, [method.name for method in methods])
        ours, others = (
            {m.name: runs[m.name] for m in methods if m.is_peer == side and m.name in runs} for side in (False, True)
        )
        parts.append(f"## {set_}\n\n{table(runs) if runs else 'Nothing is finished.'}\n")
        if ours and others:
            points[set_] = margins(ours, others)
            parts.append(described(points[set_]) + "\n")

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(parts))
    print("\n".join(parts))
    least = min((margin[name] for margin in points.values() for name in JUDGED), default=float("-inf"))
    compared = len(points) == len(arguments.sets)
    figure = f"{least:+.2f} points at the worst of P@1, P@3, P@5" if points else "nothing to compare yet"
    verdict("quality", figure, "above 0 on every set", compared and least > 0)


if __name__ == "__main__":
    main()

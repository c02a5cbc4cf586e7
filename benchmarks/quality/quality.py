"""How well every peer and our recipes tag: all of them on the same splits, scored by the same code.

Peers (peers/) get TF-IDF of words and word pairs, XR-Transformer the text as well; each runs in a virtual environment of its
own, made on first use, with two threads. Ours are the recipes jobs/configs/quality-<set>*.toml, or small-cpu.toml if a set has
none, once per seed; several models also give a row for their ensemble, which trains nothing. Runs are sequential, each in its
own process, the quickest method first. Predictions are kept below ``--results``; the row goes to a record beside the tables,
with a digest of its inputs. A run that finished, or exceeded ``--minutes``, is not repeated while its inputs are unchanged,
unless ``--again`` is given or an ensemble lacks its model; a failed run is.

All predictions are scored by `xmc_ray.metrics`, with the frequencies of the whole training split; true labels that it lacks are
left out. Seconds depend on what else the machine does; CPU s, of all processes in training and prediction, hardly do (an
ensemble's hold its members' own predictions as well).

``--fresh`` does not use the test split, on which recipes may have been chosen: nine tenths of the training split train and the
rest tests, without documents that begin like one of the nine tenths. (results/variants.md lists what was chosen there.)

The tables in ``--output`` are rewritten after every run: all rows of the record that are still valid, and the figures in which
ours is ahead of the best peer or behind it. "Ours" is the ensemble of all our models, as most peers are three trees; where
there is none, the one with the best P@1. Bar: ahead of every peer in P@1, P@3, P@5 and PSP@5 on every data set, trained within
an hour, and no run that failed or is missing; a peer may have taken too long.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm, require
from benchmarks.quality._quality import ENVIRONMENTS, PEERS, ROOT, Method, collect, fresh, peers, run, stands

SETS = ("tate", "debian-tags", "debian-deps")
FEW_LABELS = ("debian-tags",)
SEEDS = {"quality-tate": (6088, 6089, 6090), "quality-debian-tags-joint": (6088, 6089)}  # of a recipe; the others' is the first
TOTAL = tuple(f"{name}@{k}" for name in ("P", "nDCG", "PSP") for k in (1, 3, 5))
JUDGED = ("P@1", "P@3", "P@5", "PSP@5")
HOUR = 3600
CONFIGS = ROOT / "jobs" / "configs"
OURS = "xmc_ray"

Runs = dict[str, dict[str, Any]]
"""What `collect` gives for a data set: `Metrics.result` and ``costs`` of each method, or its ``failure``."""


def recipes(set_: str, seeds: Sequence[int] | None, settings: list[str]) -> list[Method]:
    """Our methods for a data set: each recipe with each seed (None: its own), and all of them together if there are several."""
    script, named = Path(__file__).with_name("_recipe.py"), f"quality-{set_}"
    files = sorted(CONFIGS.glob(f"{named}*.toml"), key=lambda file: file.stem) or [CONFIGS / "small-cpu.toml"]
    single = [
        Method(
            f"{OURS}-{file.stem.removeprefix(f'{named}-').replace(named, 'recipe')}-{seed}",
            script,
            (f"--config={file.relative_to(ROOT)}", f"--seed={seed}", *settings),
        )
        for file in files
        for seed in seeds or SEEDS.get(file.stem, (6088,))
    ]
    names = tuple(method.name for method in single)
    together = Method(f"{OURS}-ensemble-x{len(names)}", script, ("--members", *names), members=names)
    return [*single, together] if len(names) > 1 else single


def methods(set_: str, seeds: Sequence[int] | None, settings: list[str]) -> list[Method]:
    """All methods for a data set, the quickest first; a machine a label only where there are hundreds of labels."""
    first, *others = [peer for peer in peers(minilm()) if set_ in FEW_LABELS or "svc" not in peer.name]
    return [first, *recipes(set_, seeds, settings), *others]


def table(runs: Runs) -> str:
    """Markdown: metrics in percent, then P@5 by how often a label was seen in training, then what a run cost; ours are bold."""
    done = {name: one for name, one in runs.items() if "failure" not in one}
    bands = list(next(iter(done.values()))["bands"]) if done else []
    head = ["method", *TOTAL, *(f"P@5 of {band}" for band in bands), "train s", "predict s", "CPU s", "MB", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, one in sorted(done.items(), key=lambda item: -item[1]["total"]["P@1"]):
        costs = one["costs"]
        cells = [percent(one["total"][metric]) for metric in TOTAL] + [percent(one["bands"][band]["P@5"]) for band in bands]
        cells += [f"{costs['train_seconds']:.0f}", f"{costs['predict_seconds']:.1f}", f"{costs['cpu_seconds']:.0f}"]
        cells += [f"{costs[part] / 1e6:.0f}" for part in ("model_bytes", "peak_bytes")]
        lines.append("| " + " | ".join([marked(name), *cells]) + " |")
    for name in sorted(runs.keys() - done.keys()):
        lines.append("| " + " | ".join([f"{marked(name)} {runs[name]['failure']}", *"–" * (len(head) - 1)]) + " |")
    return "\n".join(lines)


def marked(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS) else name


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def margins(runs: Runs) -> dict[str, float]:
    """Points by which ours is ahead of the best peer, metric by metric; empty if a side is missing."""
    done = {name: one["total"] for name, one in runs.items() if "failure" not in one}
    together = [total for name, total in done.items() if name.startswith(f"{OURS}-ensemble")]
    ours = together or [total for name, total in done.items() if name.startswith(OURS)]
    others = [total for name, total in done.items() if not name.startswith(OURS)]
    best: dict[str, float] = max(ours, key=lambda total: float(total["P@1"]), default={})
    return {name: 100 * (best[name] - max(total[name] for total in others)) for name in TOTAL} if ours and others else {}


def lacking(sets: dict[str, Runs], asked: dict[str, list[str]]) -> list[str]:
    """Why the tables prove nothing yet: runs that are missing or failed, and models of ours that took over an hour."""
    found = []
    for set_, names in asked.items():
        for name in names:
            one = sets[set_].get(name, {"failure": "is missing"})
            if "failure" in one:
                is_slow_peer = "minutes" in one and not name.startswith(OURS)
                found += [] if is_slow_peer else [f"{set_}: {name} {one['failure']}"]
            elif name.startswith(OURS) and one["costs"]["train_seconds"] > HOUR:
                found.append(f"{set_}: {name} trained for {one['costs']['train_seconds']:.0f} s")
    return found


def described(margins: dict[str, float]) -> str:
    """Which figures are ahead, which are behind, and by how many points."""
    ahead = ", ".join(f"{name} {points:+.2f}" for name, points in margins.items() if points > 0)
    behind = ", ".join(f"{name} {points:+.2f}" for name, points in margins.items() if points <= 0)
    return f"Ahead of the best peer: {ahead or 'nothing'}. Behind: {behind or 'nothing'}."


def page(sets: dict[str, Runs], is_fresh: bool = False) -> str:
    """The tables of all data sets, and what they were made with."""
    parts = ["# Quality of tagging, ours (bold) and the peers'\n"]
    if is_fresh:
        parts.append("Nine tenths of each training split, measured on the rest; the test split is not looked at.\n")
    for set_, runs in sets.items():
        parts.append(f"## {set_}\n\n{table(runs) if runs else 'Nothing is finished.'}\n")
        if points := margins(runs):
            parts.append(described(points) + "\n")
    costs = [one["costs"] for runs in sets.values() for one in runs.values() if "failure" not in one]
    dates = sorted(one["date"][:10] for one in costs if "date" in one)
    cores = sorted({str(one["cores"]) for one in costs if "cores" in one})
    if dates:
        commits = sorted({one["commit"] for one in costs if one.get("commit")})
        own = f" Commits: {', '.join(commits)}." if commits else ""
        parts.append(
            f"Made on {' or '.join(cores)} cores, {' to '.join(sorted({dates[0], dates[-1]}))}.{own} Peers: {releases()}.\n"
        )
    return "\n".join(parts)


def releases() -> str:
    """The peers' releases, which are the first that their requirements pin; the rest stands in the same files."""
    texts = [file.read_text().splitlines() for file in sorted(PEERS.glob("*.txt"))]
    return ", ".join(next(line for line in lines if not line.startswith("#")).replace("==", " ") for lines in texts)


def read(record: Path) -> dict[str, Runs]:
    """The rows of a record, by data set."""
    sets: dict[str, Runs] = {}
    for line in record.read_text().splitlines() if record.exists() else ():
        row = json.loads(line)
        sets.setdefault(row.pop("set"), {})[row.pop("method")] = row
    return sets


def write(output: Path, sets: dict[str, Runs], is_fresh: bool) -> None:
    """The tables, and their record: a line a row, sorted, so that two states of it differ in the rows that do."""
    rows = [{"set": set_, "method": name} | sets[set_][name] for set_ in sorted(sets) for name in sorted(sets[set_])]
    partial = output.with_suffix(".partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    partial.replace(output.with_suffix(".jsonl"))  # a run that is ended here leaves the record whole
    output.write_text(page(sets, is_fresh))


def holding(runs: Runs, queue: list[Method], data: Path) -> Runs:
    """Those of ``runs`` whose methods, in ``queue``, are still made of the same."""
    return {one.name: runs[one.name] for one in queue if one.name in runs and stands(told(runs[one.name]), one, data, 0.0)}


def unfinished(runs: Runs, queue: list[Method], data: Path, minutes: float) -> list[Method]:
    """What of ``queue`` is to be run: what has no row that stands and is as new as its members', and they."""
    date = {name: told(one).get("date", "") for name, one in runs.items()}
    left = [
        one
        for one in queue
        if not stands(told(runs.get(one.name, {})), one, data, minutes)
        or date[one.name] < max((date.get(name, "") for name in one.members), default="")
    ]
    needed = {name for one in left for name in one.members}
    return [one for one in queue if one in left or one.name in needed]


def told(one: dict[str, Any]) -> dict[str, Any]:
    """What a row says of how its run was made."""
    costs: dict[str, Any] = one.get("costs", one)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of data sets in it")
    parser.add_argument(
        "--methods", nargs="+", help="only methods whose name begins with one of these, such as omikuji xmc_ray"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of each of our recipes, each of them a row; those in this file")
    parser.add_argument("--results", type=Path, help="where runs are kept; runs/peers-results, or peers-fresh")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where the peers' virtual environments are")
    parser.add_argument(
        "--output", type=Path, help="the tables, as Markdown; benchmarks/results/quality.md, or quality-fresh.md"
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="a run that takes longer is ended")
    parser.add_argument("--again", action="store_true", help="repeat finished runs")
    parser.add_argument("--fresh", action="store_true", help="train and test on the training split alone")
    parser.add_argument("--score", action="store_true", help="run nothing: score and compare what is there")
    arguments, settings = parser.parse_known_args()
    wanted = tuple(arguments.methods or ("",))
    results = arguments.results or ROOT / "runs" / ("peers-fresh" if arguments.fresh else "peers-results")
    output = arguments.output or ROOT / "benchmarks" / "results" / ("quality-fresh.md" if arguments.fresh else "quality.md")
    folders = {set_: require(arguments.data / set_) for set_ in arguments.sets}
    if arguments.fresh:
        folders = {set_: fresh(folder, results / "data" / set_) for set_, folder in folders.items()}

    known = {set_: methods(set_, arguments.seeds, settings) for set_ in folders}
    queues = {set_: [one for one in queue if one.name.startswith(wanted)] for set_, queue in known.items()}
    kept = read(output.with_suffix(".jsonl"))
    sets = {set_: kept.get(set_, {}) for set_ in dict.fromkeys([*SETS, *kept, *known]) if set_ in kept.keys() | known.keys()}
    for set_, queue in known.items():
        found = sets[set_], collect(folders[set_], results / set_, [one.name for one in queue])
        sets[set_] = {name: one for runs in found for name, one in holding(runs, queue, folders[set_]).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    rounds = [] if arguments.score else zip_longest(*([(set_, one) for one in queue] for set_, queue in queues.items()))
    for set_, method in (turn for turns in rounds for turn in turns if turn):
        data, out = folders[set_], results / set_ / method.name
        if arguments.again:
            shutil.rmtree(out, ignore_errors=True)
        elif method not in unfinished(sets[set_], queues[set_], data, arguments.minutes):
            continue
        run(method, data, out, arguments.environments, arguments.minutes)
        sets[set_] |= collect(data, out.parent, [method.name])
        write(output, sets, arguments.fresh)

    write(output, sets, arguments.fresh)
    print(page(sets, arguments.fresh))
    points = [margins(sets[set_]) for set_ in queues]
    least = min((one[name] for one in points if one for name in JUDGED), default=float("-inf"))
    faults = lacking(sets, {set_: [one.name for one in queue] for set_, queue in queues.items()})
    print("\n".join(faults))
    figure = f"{least:+.2f} points at the worst of {', '.join(JUDGED)}" if any(points) else "nothing to compare yet"
    over = ["failure" not in sets[set_].get(one.name, {"failure": ""}) for set_, queue in queues.items() for one in queue]
    holds = all(points) and least > 0 and not faults
    verdict("quality", f"{figure}, {sum(over)} of {len(over)} runs finished", "above 0 on every set", holds)


if __name__ == "__main__":
    main()

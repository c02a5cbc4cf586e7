"""The tables of the benchmarks of quality, and whether ours are ahead: Markdown from what `collect` gives."""

from collections.abc import Callable
from typing import Any

from benchmarks.quality._quality import PEERS

TOTAL = tuple(f"{name}@{k}" for name in ("P", "nDCG", "PSP") for k in (1, 3, 5))
JUDGED = ("P@1", "P@3", "P@5", "PSP@5")
COSTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "CPU s": lambda costs: float(costs["cpu_seconds"]),
    "wall s": lambda costs: float(costs["train_seconds"] + costs["predict_seconds"]),
    "peak MB": lambda costs: float(costs["peak_bytes"] / 1e6),
}
HOUR = 3600
OURS = "xmc_ray"

Runs = dict[str, dict[str, Any]]
"""What `collect` gives for a data set: `Metrics.result` and ``costs`` of each method, or its ``failure``."""


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


def sides(runs: Runs) -> tuple[dict[str, Any], Runs]:
    """What stands for ours (the ensemble, else the model with the best P@1; empty if there is none), and all peers."""
    done = {name: one for name, one in runs.items() if "failure" not in one}
    ours = [one for name, one in done.items() if name.startswith(OURS)]
    together = [one for name, one in done.items() if name.startswith(f"{OURS}-ensemble")]
    best: dict[str, Any] = max(together or ours, key=lambda one: float(one["total"]["P@1"]), default={})
    return best, {name: one for name, one in done.items() if not name.startswith(OURS)}


def margins(runs: Runs) -> dict[str, float]:
    """Points by which ours is ahead of the best peer, metric by metric; empty if a side is missing."""
    ours, others = sides(runs)
    best = {name: max(one["total"][name] for one in others.values()) for name in TOTAL if others}
    return {name: 100 * (ours["total"][name] - value) for name, value in best.items() if ours}


def compared(runs: Runs) -> str:
    """Markdown: ours beside the best peer of each figure, in points or, for costs, as a ratio; empty if a side is missing."""
    ours, others = sides(runs)
    if not ours or not others:
        return ""
    lines = ["| figure | ours | best peer | | difference | |", "| --- | ---: | ---: | --- | ---: | --- |"]
    for name in TOTAL:
        best = max(others, key=lambda other: float(others[other]["total"][name]))
        points = 100 * (ours["total"][name] - others[best]["total"][name])
        cells = [name, percent(ours["total"][name]), percent(others[best]["total"][name]), best, f"{points:+.2f}"]
        lines.append("| " + " | ".join([*cells, "ahead" if points > 0 else "behind"]) + " |")
    for name, cost in COSTS.items():
        best = min(others, key=lambda other: cost(others[other]["costs"]))
        own, least = cost(ours["costs"]), cost(others[best]["costs"])
        cells = [name, f"{own:,.0f}", f"{least:,.0f}", best, f"{own / max(least, 1e-9):.2f} times"]
        lines.append("| " + " | ".join([*cells, "ahead" if own < least else "behind"]) + " |")
    return "\n".join(lines)


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


def page(sets: dict[str, Runs], about: str = "") -> str:
    """The tables of all data sets, what is said ``about`` them, and what they were made with."""
    parts = ["# Quality of tagging, ours (bold) and the peers'\n", *([about + "\n"] if about else [])]
    for set_, runs in sets.items():
        parts.append(f"## {set_}\n\n{table(runs) if runs else 'Nothing is finished.'}\n")
        if comparison := compared(runs):
            parts.append(comparison + "\n")
    rows = [(name, told(one)) for runs in sets.values() for name, one in runs.items()]
    dates = sorted(one["date"][:10] for _, one in rows if "date" in one)
    if dates:
        period = " to ".join(sorted({dates[0], dates[-1]}))
        commits = ", ".join(sorted({one["commit"] for _, one in rows if one.get("commit")})) or "not recorded"
        parts.append(f"Made from {period}. Commits: {commits}. Peers: {releases()}.\n")
        machines = {one.get("machine", f"not recorded, {one.get('cores', '?')} cores") for _, one in rows}
        states = {one.get("library") or "not recorded" for name, one in rows if name.startswith(OURS)}
        parts += [counted("machine", machines), counted("state of the library", states)]
    return "\n".join(parts)


def counted(what: str, found: set[str]) -> str:
    """A line that names what rows are of, and says so if that is not one and the same."""
    warning = "" if len(found) < 2 else f" Rows of more than one {what} are not comparable in all figures."
    return f"{what.capitalize()}: {'; '.join(sorted(found)) or 'none'}.{warning}\n"


def releases() -> str:
    """The peers' releases, which are the first that their requirements pin; the rest stands in the same files."""
    texts = [file.read_text().splitlines() for file in sorted(PEERS.glob("*.txt"))]
    return ", ".join(next(line for line in lines if not line.startswith("#")).replace("==", " ") for lines in texts)


def told(one: dict[str, Any]) -> dict[str, Any]:
    """What a row says of how its run was made."""
    costs: dict[str, Any] = one.get("costs", one)
    return costs

"""Makes the pictures of the docs: figures of a run, and the page as a browser shows it.

    python examples/pictures.py --folder runs --out docs/pictures      needs Chromium, and pip install '.[dev]'

``--folder`` is what `xmc-ray show` is given; its first finished run and its latest night are taken.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xmc_ray.bundle.folder import read_calibration
from xmc_ray.data.labels import LabelIndex
from xmc_ray.metrics.calibration import BINS
from xmc_ray.on_ray.tag.nights import all_nights, day_of, marked_run
from xmc_ray.reports.curves import Curves
from xmc_ray.show.app import address
from xmc_ray.show.folder import find
from xmc_ray.show.night import read_night
from xmc_ray.show.tags import Query, search

LOOKS: tuple[tuple[Literal["light", "dark"], int, int], ...] = (
    ("light", 1400, 900),
    ("dark", 1400, 900),
    ("light", 390, 844),
    ("dark", 390, 844),
)
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
SLOW = 300_000  # milliseconds for a page on a busy machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="runs and outputs, as xmc-ray show takes it")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where the pictures go")
    parser.add_argument("--only", nargs="*", help="names of pages, all if not given")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = find(str(given.folder.resolve()))
    for name, draw in FIGURES.items():
        for run in found.runs.values():
            if draw(Path(run), given.out / f"{name}.svg"):
                print(f"{name}: {run}", flush=True)
                break
        else:
            print(f"{name}: no run has what it shows", flush=True)
    pages = {name: path for name, path in page_paths(found.outputs, found.runs).items() if not given.only or name in given.only}
    with served(given.folder) as site:
        shoot({name: site + path for name, path in pages.items()}, given.out)


def draw_curves(run: Path, out: Path) -> bool:
    """Losses over steps."""
    if not (run / "metrics.jsonl").exists():
        return False
    points = Curves.read((run / "metrics.jsonl").read_bytes().splitlines()).points.get("loss", [])
    return bool(points) and save(lambda axes: axes.plot(*zip(*points, strict=True)), "step", "loss", out)


def draw_calibration(run: Path, out: Path) -> bool:
    """The share of held-out predictions that are right, by their score before and after calibration."""
    calibration = calibration_of(run)
    if calibration is None:
        return False
    chances = np.interp(calibration.score_N, *calibration.knots)

    def plot(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], "k:", lw=1)
        for name, scores in (("scores", calibration.score_N), ("calibrated, on the documents it was fitted on", chances)):
            bins = np.minimum((scores * BINS).astype(int), BINS - 1)
            n, total, right = (np.bincount(bins, weights, BINS) for weights in (None, scores, calibration.hit_N))
            axes.plot(total[n > 0] / n[n > 0], right[n > 0] / n[n > 0], label=name)
        axes.legend(frameon=False)

    return save(plot, "mean score", "share that is right", out)


def draw_precision(run: Path, out: Path) -> bool:
    """Precision of the predictions above a threshold against the share of right ones that it keeps."""
    calibration = calibration_of(run)
    if calibration is None or not calibration.hit_N.any():
        return False
    right = np.cumsum(calibration.hit_N[np.argsort(-calibration.score_N)])
    precision, kept = right / np.arange(1, len(right) + 1), right / right[-1]
    return save(lambda axes: axes.plot(kept[20:], precision[20:]), "share of the right predictions kept", "precision", out)


FIGURES: dict[str, Callable[[Path, Path], bool]] = {
    "curves": draw_curves,
    "calibration": draw_calibration,
    "precision": draw_precision,
}


def calibration_of(run: Path) -> Any:
    import pyarrow.parquet as pq

    bundle = run / "bundle"
    if not (bundle / "config.json").exists():
        return None
    return read_calibration(bundle, LabelIndex.from_table(pq.read_table(bundle / "labels.parquet")))


def save(plot: Callable[[Any], object], x: str, y: str, out: Path) -> bool:
    """An SVG of one chart, the same file every time."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xmc_ray"}):
        figure.savefig(out, metadata={"Date": None})
    return True


def page_paths(outputs: dict[str, str], runs: dict[str, str]) -> dict[str, str]:
    """Pages by their names: of a run, and of the latest finished night of the first output with one."""
    paths = {"overview": "/"} | ({"run": address("/run", at=next(iter(runs)))} if runs else {})
    for name, output in outputs.items():
        finished = [folder for folder in all_nights(output) if marked_run(folder) is not None]
        if finished:
            here = {"at": name, "day": day_of(finished[-1])}
            paths |= {"nights": address("/nights", at=name)}
            paths |= {page: address(f"/{page}", here) for page in ("night", "documents", "labels", "report")}
            tagged = next((row for row in search(read_night(finished[-1]).files, Query(), limit=9).rows if row["labels"]), None)
            if tagged is not None:
                one = {"id": tagged["id"], "label": tagged["labels"][0]}
                paths |= {page: address(f"/{page}", here, one) for page in ("document", "label", "why")}
            break
    return paths


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the page over ``folder``, without a slash at its end."""
    command = [sys.executable, str(Path(__file__).parents[1] / "jobs" / "show.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[0].rstrip("/")
        finally:
            server.terminate()


def shoot(pages: dict[str, str], out: Path) -> None:
    """A picture of each page in each of `LOOKS`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = [f"--{each}" for each in QUIET.split()]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=options, timeout=SLOW)
        for name, url in pages.items():
            for scheme, width, height in LOOKS:
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(url, timeout=SLOW)
                page.screenshot(path=out / f"{name}-{width}-{scheme}.png", timeout=SLOW)
                page.close()
            print(name, flush=True)
        browser.close()


if __name__ == "__main__":
    main()

"""The documents' figures, drawn from kept results, and the picture of a report.

    make figures
    make figures ARGS="--report runs/demo/hpo/catalogue/_nights/dt=2026-11-29/report.html --picture docs/pictures/night.png"

A picture is taken by Debian's chromium, of what a screen of 1,400 pixels shows first, or `--width`.
"""

import argparse
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def thresholds(axes: "Axes") -> None:
    """Of calibrated scores on tate's test split: what is promised, what is reached, and what it costs."""
    table = (RESULTS / "calibration.txt").read_text().partition("labels never tagged\n")[2].partition("\n\n")[0]
    asked, precision, coverage = zip(*(map(float, line.split()[:3]) for line in table.splitlines()), strict=True)
    axes.plot(asked, asked, ":", color="grey", label="as asked for")
    axes.plot(asked, precision, "o-", label="precision reached")
    axes.plot(asked, coverage, "s--", label="documents that keep a tag")
    axes.set(xlabel="precision asked for", ylabel="share", ylim=(0, 1), title="Thresholds, Tate subjects")


def demo_curves(axes: "Axes") -> None:
    """The demo's validations."""
    text = (RESULTS / "demo.txt").read_text()
    found = re.findall(r"^step ([\d,]+): validation P@1 ([\d.]+).*?documents ([\d.]+), untrained ([\d.]+)", text, re.MULTILINE)
    steps = [int(step.replace(",", "")) for step, *_ in found]
    axes.plot([0, *steps], [float(found[0][3]), *(float(loss) for *_, loss, _ in found)], "o-", label="loss in training")
    right = axes.twinx()
    right.plot(steps, [float(value) for _, value, *_ in found], "s--", color="C1", label="P@1, held out")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="The demo trains")
    right.set(ylabel="P@1, percent", ylim=(80, 100))
    right.legend(loc="center right")


FIGURES: dict[str, Callable[["Axes"], None]] = {"thresholds": thresholds, "demo-curves": demo_curves}


def draw(name: str) -> str:
    """A figure as SVG, the same whenever its record is."""
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 11, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        FIGURES[name](axes)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


def take_picture(report: Path, picture: Path, width: int, height: int) -> None:
    """Raises CalledProcessError if the browser does, FileNotFoundError if there is none."""
    browser = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture.resolve()}"]
        subprocess.run([browser, *FLAGS, *options, report.resolve().as_uri()], check=True, capture_output=True, timeout=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a page to take a picture of")
    parser.add_argument("--picture", type=Path, default=PICTURES / "night.png")
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=900)
    arguments = parser.parse_args()
    if arguments.report:
        take_picture(arguments.report, arguments.picture, arguments.width, arguments.height)
        return
    PICTURES.mkdir(exist_ok=True)
    for name in FIGURES:
        (PICTURES / f"{name}.svg").write_text(draw(name))


if __name__ == "__main__":
    main()

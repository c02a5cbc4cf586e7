"""What an ensemble adds in minutes that one model leaves over: the tuning job with ``--members`` against its first model.

`jobs/tune.py` gets a part of the training documents of a data set; the rest judge and take no part (`held_out`). Its first
bundle is what it makes without ``--members``, of the same trials. Both label the judges in this process. ``--titles`` takes of
each text its title, so that one model is done before its minutes are.

Bar: the mean of P@1, P@3, P@5 and PSP@5 gains at least 0.3 points.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm
from benchmarks.quality.auto import title
from benchmarks.quality.fields import cpu
from benchmarks.quality.held_out import FIGURES, parted
from xmc_ray.classifier import XMCClassifier

ROOT, BAR = Path(__file__).parents[2], 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "debian-tags", help="a folder with train.parquet")
    parser.add_argument("--documents", type=int, help="random training documents, judging ones included; all by default")
    parser.add_argument("--titles", action="store_true", help="the titles alone")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--members", type=int, default=3)
    given = parser.parse_args()
    judges, rest = parted(given.data, given.documents or pq.read_metadata(given.data / "train.parquet").num_rows)
    if given.titles:
        judges, rest = (
            rows.set_column(rows.column_names.index("text"), "text", title(rows["text"].combine_chunks()))
            for rows in (judges, rest)
        )
    print(f"{given.data.name}: {len(rest):,} documents, {len(judges):,} others judge, {given.minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(rest, f"{folder}/train.parquet")
        settings = {"documents.uri": f"{folder}/train.parquet", "encoder": minilm(), "output": f"{folder}/tuned"}
        settings |= {"documents.id": "null", "minutes": given.minutes, "members": given.members}
        call = [sys.executable, str(ROOT / "jobs" / "tune.py"), *(f"--{name}={value}" for name, value in settings.items())]
        subprocess.run(call, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(ROOT)})
        bundles = sorted(Path(folder, "tuned").glob("run*/bundle"))
        print(f"| models | {' | '.join(FIGURES)} | CPU s to label |\n| --- {'| ---: ' * (len(FIGURES) + 1)}|")
        one, all_ = (reached(bundles[:count], judges["text"].to_pylist(), judges["labels"].to_pylist()) for count in (1, None))
    gain = sum(all_[name] - one[name] for name in FIGURES) / len(FIGURES)
    verdict("members", f"{gain:+.2f} by {len(bundles)} models", f"{BAR:+.2f}", gain >= BAR)
    return 0 if gain >= BAR else 1


def reached(bundles: list[Path], texts: list[str], labels: list[list[str]]) -> dict[str, float]:
    """The figures of bundles in percent; prints their row."""
    classifier = XMCClassifier.load(list(bundles), device="cpu")
    started = cpu()
    total = classifier.evaluate(texts, labels)["total"]
    figures = {name: 100 * total[name] for name in FIGURES}
    print(
        f"| {len(bundles)} | {' | '.join(f'{value:.2f}' for value in figures.values())} | {cpu() - started:.1f} |", flush=True
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())

"""Nights and runs written by hand, as the documented layout has them: for tests of who reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.documents import text_digest

_TAGS = pa.schema(
    [
        ("id", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("names", pa.list_(pa.string())),
        ("model", pa.string()),
        ("text_digest", pa.string()),
    ]
)
Document = tuple[str, str, Mapping[str, float]]
"""Id, text, and its labels with their scores, the best first."""


def write_night(
    output: Path, day: str, documents: Sequence[Document], *, files: int = 1, group: int = 7, **manifest: Any
) -> Path:
    """A finished night in ``output``, its catalogue beside it, in row groups of ``group`` rows; returns its folder."""
    output, run = output.absolute(), f"run{day.replace('-', '')}"
    night, tags, catalogue = (
        output / "_nights" / f"dt={day}",
        output / "tags" / f"dt={day}",
        output.parent / f"in-{day}.parquet",
    )
    for folder in (night, tags):
        folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": [one[0] for one in documents], "text": [one[1] for one in documents]}), catalogue)
    digests = text_digest(pa.array([one[1] for one in documents], pa.string())).to_pylist()
    rows = [
        {"id": id, "labels": [*given], "scores": [*given.values()], "names": [*given], "model": "0" * 16, "text_digest": digest}
        for (id, _, given), digest in zip(documents, digests, strict=True)
    ]
    names, share = [f"part-{run}-{number:05}.parquet" for number in range(files)], -(-len(rows) // files)
    for number, name in enumerate(names):
        part = pa.Table.from_pylist(rows[number * share : (number + 1) * share], _TAGS)
        pq.write_table(part, tags / name, row_group_size=group)
    counts = dict[str, list[float]]()
    for _, _, given in documents:
        for label, score in given.items():
            counts.setdefault(label, []).append(score)
    labels = {
        "label": [*counts],
        "documents": [len(one) for one in counts.values()],
        "scores": [sum(one) for one in counts.values()],
    }
    pq.write_table(
        pa.table(labels, pa.schema({"label": pa.string(), "documents": pa.int64(), "scores": pa.float64()})),
        night / "label-counts.parquet",
    )
    file = storage.stat(str(catalogue))
    content = {
        "run": run,
        "bundle": "0" * 16,
        "scoring": "grouped",
        "input": [vars(file)],
        "config": {"documents": {"uri": str(catalogue)}, "bundle": str(output.parent / "bundle")},
        "in": len(rows),
        "tagged": len(rows),
        "reused": 0,
        "rejected": 0,
        "untagged": sum(not given for _, _, given in documents),
        "reasons": {},
        "scores": [0] * 20,
        "started": f"{day}T02:00:00+00:00",
        "ended": f"{day}T02:03:20+00:00",
        "documents_per_second": 12.5,
        "drift": {"training": 0.05, "previous": None},
    }
    storage.write_json(str(night / "manifest.json"), content | manifest)
    (night / "report.html").write_text("<!doctype html><title>Report</title><p>of the night")
    sizes = {name: (tags / name).stat().st_size for name in names}
    storage.write_json(
        str(night / "_SUCCESS"), {"run": run, "files": names, "rejects": [], "changes": [], "rows": {}, "sizes": sizes}
    )
    return night


def write_run(folder: Path, steps: int = 20) -> Path:
    """The folder of a training run that is not finished: its journal and its settings."""
    folder.mkdir(parents=True)
    lines = [f'{{"step": {step}, "loss": {10 / (1 + step)}, "head_lr": 0.002}}' for step in range(1, steps + 1)]
    lines += [f'{{"step": {steps}, "validation/P@1": 0.5, "validation/P@5": 0.25}}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text('output = "<script>alert(1)</script>"\n')
    return folder

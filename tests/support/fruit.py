"""A catalogue of fruit with a simple rule, and the settings that learn it in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import EncoderConfig, FitConfig, GroupsConfig, LoopConfig, ModelConfig, OptimConfig, storage
from xmc_ray.on_ray.tag.nights import files_named

_TAGS = pa.schema([("id", pa.string()), ("labels", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
_REJECTS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in ("id", "reason", "detail"))]
)

COLOURS, KINDS = ["red", "green", "yellow"], ["apple", "pear", "plum", "grape"]


def write_catalogue(folder: Path) -> None:
    """``train``, ``test`` and ``labels``: a document's labels are words of its text."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 240), ("test", 48)):
        rows = []
        for number in range(size):
            colour, kind = rng.choice(COLOURS), rng.choice(KINDS)
            rows.append(
                {"id": f"{split}-{number}", "text": f"a {colour} {kind} number {number}", "labels": ["fruit", colour, kind]}
            )
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    names = [{"label": label, "name": label.upper()} for label in ["fruit", *COLOURS]]
    pq.write_table(pa.Table.from_pylist(names), folder / "labels.parquet")


def problem(n_rows: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Texts and labels in memory."""
    rng = np.random.default_rng(seed)
    pairs = [(str(rng.choice(COLOURS)), str(rng.choice(KINDS))) for _ in range(n_rows)]
    return [f"a {colour} {kind}" for colour, kind in pairs], [["fruit", colour, kind] for colour, kind in pairs]


def fit_config(tiny_encoder: Path, max_size: int) -> FitConfig:
    """Settings that learn them in a second; labels in groups of ``max_size``."""
    return FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), feature_layers=3, pooling="mean"),
        groups=GroupsConfig(max_size=max_size),
        model=ModelConfig(shortlist=3, bottleneck=16, dropout=0.1),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=12, batch_size=8),
    )


def options(fruit: Path, tiny_encoder: Path, output: object, *further: str) -> list[str]:
    settings = {
        "documents.uri": fruit / "train.parquet",
        "label_names": fruit / "labels.parquet",
        "output": output,
        "encoder.name": tiny_encoder,
        "encoder.feature_layers": 3,
        "encoder.pooling": "mean",
        "groups.max_size": 3,
        "model.shortlist": 3,  # a document's three labels may lie in three groups
        "model.bottleneck": 16,
        "model.dropout": 0.1,
        "optim.encoder_lr": 2e-3,
        "optim.head_lr": 2e-2,
        "loop.epochs": 10,
        "loop.batch_size": 8,
        "validation.share": 0.1,
        "validation.every": 4,
        "loop.precision": "float32",  # the same on all CPUs
        "workers.threads": 1,  # more than one is many times slower where other processes are busy
    }
    return [f"--{name}={value}" for name, value in settings.items()] + list(further)


def document(number: int) -> dict[str, str]:
    """A row of a catalogue as long as one likes; its id says its number."""
    text = f"a {COLOURS[number % 3]} {KINDS[number % 4]} number {number}"
    return {"id": f"d{number}", "text": text}


def read_night(folder: object) -> tuple[pa.Table, pa.Table]:
    """Tags and rejects of a finished night: of the files that its marker names, in their order."""
    marker = storage.read_json(storage.join(str(folder), "_SUCCESS"))
    named = files_named(str(folder), marker)
    tables = []
    for names, empty in ((marker["files"], _TAGS), (marker["rejects"], _REJECTS)):
        places = [storage.arrow_filesystem(named[name]) for name in names]
        files = [pq.read_table(path, filesystem=filesystem, partitioning=None) for filesystem, path in places]
        tables.append(pa.concat_tables(files) if files else empty.empty_table())
    return tables[0], tables[1]


def manifest_of(folder: str) -> dict[str, Any]:
    return dict(storage.read_json(storage.join(folder, "manifest.json")))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A catalogue of small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def contents(folder: object) -> dict[str, int]:
    """All files and when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in Path(str(folder)).rglob("*") if path.is_file()}

"""What Weights & Biases has written in its offline mode, read back.

A run's file is a header of 7 bytes and records of protobuf, in the log format of LevelDB: blocks of 32 KiB, in which each
piece of a record has 4 bytes of checksum, 2 of length, and one that says whether it is all of the record, the first piece, a
middle one or the last.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32 * 1024, 7
_SECONDS = 60.0  # for a run that has ended to be written


def records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # the rest of a block is too short for a piece
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + _HEADER + length > len(content):  # being written
            return
        record += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    """Of each run in ``folder``, as they began: ``id``, ``project``, ``name``, ``config``, ``history`` (steps
    with their figures), ``summary``, names of ``files`` in artifacts, and the ``exit`` code."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    deadline = time.monotonic() + _SECONDS
    while True:
        runs = [_run(file) for file in files]
        if all(run["exit"] is not None for run in runs):
            return runs
        assert time.monotonic() < deadline, runs
        time.sleep(0.1)


def _run(file: Path) -> dict[str, Any]:
    run: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "files": [], "exit": None}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            run["config"] |= _values(record.run.config.update)
        elif kind == "history":
            run["history"].append(_values(record.history.item))
        elif kind == "summary":
            run["summary"] |= _values(record.summary.update)
        elif kind == "artifact":
            run["files"] += [entry.path for entry in record.artifact.manifest.contents]
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

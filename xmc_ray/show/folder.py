"""What lies in the folder that is shown: training runs, and outputs with nights."""

import posixpath
from collections import deque
from dataclasses import dataclass, field

from xmc_ray import storage
from xmc_ray.errors import XmcError
from xmc_ray.on_ray.tag.nights import NIGHTS, TAGS
from xmc_ray.storage.files import join

_DEPTH, _FOLDERS = 6, 2000  # levels below the folder, and folders that are looked into
JOURNAL, SETTINGS, BUNDLE, REPORT = "metrics.jsonl", "run.toml", "bundle", "report.html"


@dataclass(frozen=True)
class Found:
    """Addresses of ``runs`` and ``outputs`` by their names, relative to the folder; ``.`` is the folder itself.

    ``cut``: there are more folders than were looked into.
    """

    runs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def find(root: str) -> Found:
    """The runs and outputs at and below ``root``, nearest first; hidden folders and those of runs are passed over."""
    found = Found()
    waiting, seen = deque([(".", root, 0)]), 0
    while waiting and seen < _FOLDERS:
        name, folder, depth = waiting.popleft()
        seen += 1
        try:
            is_run, below = _is_run(folder), storage.subfolders(folder)
        except XmcError:  # one that may not be read
            continue
        if is_run:
            found.runs[name] = folder
            continue
        if NIGHTS in below or any(each.startswith("dt=") for each in below):
            found.outputs[name] = folder
        for each in below if depth < _DEPTH else ():
            if each[0] not in "_." and each != TAGS and not each.startswith("dt="):
                waiting.append((posixpath.normpath(posixpath.join(name, each)), join(folder, each), depth + 1))
    return Found(dict(sorted(found.runs.items())), dict(sorted(found.outputs.items())), bool(waiting))


def _is_run(folder: str) -> bool:
    """A bundle has its run's settings as well, but no journal."""
    if storage.exists(join(folder, JOURNAL)):
        return True
    return storage.exists(join(folder, SETTINGS)) and not storage.exists(join(folder, "model.safetensors"))

"""Checkpoints: the state of a training run, sharded so that any number of workers can resume it.

    <folder>/step-000001200/
        dense.safetensors                 encoder and bottleneck, the same on all workers: weights, optimiser state, average
        rows-00000-of-00002.safetensors   the rows of recall head and label table that the first of two workers owns
        rows-00001-of-00002.safetensors
        checkpoint.json                   counters, identity, and the size of every file; written last

Each worker writes what it owns to its local disk while training waits, and uploads it in the background. The first worker
writes the marker once all files are there: a folder without it, or with a file of another size, is not a checkpoint.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmc_ray import storage
from xmc_ray.errors import DataError, ModelError
from xmc_ray.model.sharding import part_of
from xmc_ray.settings import PositiveFloat, PositiveInt, Settings
from xmc_ray.storage import folders
from xmc_ray.storage.files import PATIENCE
from xmc_ray.training.loop import TrainState

FORMAT = 3  # 1 had the rows' accumulators in other units, 2 began them at 0 and had no scales

MARKER = "checkpoint.json"
DENSE = "dense.safetensors"
_POLL = 1.0  # seconds from one look for the files of the other workers to the next
_HURRY = 15.0  # seconds of training from one save to the next while a machine is about to be taken away
_COUNTERS = ("step", "seconds", "waiting", "documents", "tokens", "padded_tokens", "untrained_loss")
_FOLDER = re.compile(r"/step-(\d+)/([^/]+)$")

Identity = Mapping[str, object]
"""What a run and its checkpoints have in common: label set, groups, shape of the model, documents and their order."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsConfig(Settings):
    """When the state of training is saved, how much is kept, and for how long."""

    steps: PositiveInt | None = None
    """Save every n steps; None saves by the clock and at each validation only."""
    minutes: PositiveFloat = 10.0
    """Minutes of training from one save to the next."""
    keep_last: PositiveInt = 2
    """Number of most recent checkpoints to keep, in addition to the best by validation."""
    keep: bool = False
    """Keep them when the run is finished, for other runs to start from; false removes them, twice the size of the bundle."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint: its folder, the number of ``workers`` that wrote it, and the content of its marker."""

    uri: str
    workers: int
    counters: dict[str, Any]
    identity: dict[str, Any]
    score: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The number of steps done."""
        return int(self.counters["step"])

    def check(self, identity: Identity) -> None:
        """Raises ModelError if the run that wrote it had another ``identity``."""
        for name, expected in identity.items():
            found = self.identity.get(name)
            if found != expected:
                raise ModelError(
                    f"the checkpoint is of a run with other {name}",
                    where=self.uri,
                    found=found,
                    expected=expected,
                    way_out="resume with that run's documents and settings, or start over: another output, --resume never",
                )


def find(place: str, warn: Callable[[str], None] = lambda line: None) -> list[Saved]:
    """The complete checkpoints at ``place``, newest first; ``warn`` gets a line for each incomplete one.

    ``place`` is a folder of checkpoints or a checkpoint. Raises ModelError for another format.
    """
    saved = []
    for step, sizes in sorted(_folders(place).items(), reverse=True):
        uri = place if re.search(r"/step-\d+/*$", place) else storage.join(place, _name(step))
        try:
            saved.append(_read(uri, sizes))
        except _IncompleteError as error:
            warn(f"warning: passing over the checkpoint {uri}: {error}")
    return saved


class Checkpoints:
    """Saves and resumes one worker's part of the checkpoints of a run, which are in the folder ``place``.

    All workers call `save` and `wait` at the same steps. ``saved`` is called in the background, on the first worker, with the
    step and the address of each checkpoint that is complete.
    """

    def __init__(
        self,
        place: str,
        config: CheckpointsConfig,
        identity: Identity,
        saved: Callable[[int, str], None] = lambda step, uri: None,
    ) -> None:
        self.place = place
        self.config = config
        self.identity = dict(identity)
        self._saved = saved
        self.saved_at = 0.0  # seconds of training
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copying: Future[None] | None = None

    def resume(self, state: TrainState, warn: Callable[[str], None]) -> Saved | None:
        """Restore ``state`` from the newest complete checkpoint, if there is one, and remove incomplete ones."""
        exchange, device = state.model.exchange, next(state.model.parameters()).device
        saved = storage.patiently(find, self.place, warn)
        newest = saved[0] if saved else None
        (steps,) = exchange.counts(newest.step if newest else 0, device=device)
        if len(set(steps)) > 1:
            raise ModelError("the workers see different checkpoints", where=self.place, way_out="use a storage that all share")
        if newest:
            newest.check(self.identity)
            restore(state, newest)
            self.saved_at = state.seconds
        if exchange.rank == 0:
            for step in set(_folders(self.place)) - {entry.step for entry in saved}:
                storage.remove(storage.join(self.place, _name(step)))
        exchange.sum(torch.zeros(1, device=device), "checkpoints")  # a barrier: no worker saves before that is done
        return newest

    def due(self, state: TrainState, hurry: bool = False) -> bool:
        """Whether it is time to save; all workers agree, since they have the same counters.

        ``hurry``: a machine is about to be taken away. What was trained since the last save would be lost with it, so a save
        is due every few seconds.
        """
        by_step = self.config.steps is not None and state.step % self.config.steps == 0
        return by_step or state.seconds - self.saved_at >= min(_HURRY if hurry else math.inf, 60 * self.config.minutes)

    def save(self, state: TrainState, score: float | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Write ``state`` to the local disk and start to upload it.

        ``score`` determines the best checkpoint. Raises the error of the previous upload, if it failed.
        """
        self.wait()
        exchange = state.model.exchange
        folder = tempfile.TemporaryDirectory(prefix="xmc_ray-checkpoint-")
        _save(_rows(state), folder.name, _rows_file(exchange.rank, exchange.world))
        if exchange.rank == 0:
            _save(_weights(state, of_rows=False) | state.optimizer.dense_state(), folder.name, DENSE)
        marker = {
            "xmc_ray_checkpoint": FORMAT,
            "workers": exchange.world,
            "counters": {name: getattr(state, name) for name in _COUNTERS} | {"averaged": state.averager.count},
            "score": score,
            "metrics": dict(metrics or {}),
            "identity": self.identity,
        }
        self.saved_at = state.seconds
        self._copying = self._thread.submit(self._copy, folder, marker, exchange.rank)

    def wait(self) -> None:
        """Wait until the last checkpoint is uploaded; raises the error if that failed."""
        if self._copying is not None:
            copying, self._copying = self._copying, None
            copying.result()

    # -- in the background -----------------------------------------------------------------------------------------------

    def _copy(self, folder: "tempfile.TemporaryDirectory[str]", marker: dict[str, Any], rank: int) -> None:
        step, workers = marker["counters"]["step"], marker["workers"]
        uri = storage.join(self.place, _name(step))
        with folder:
            storage.patiently(folders.upload, folder.name, uri)
        if rank == 0:
            names = {DENSE, *(_rows_file(part, workers) for part in range(workers))}
            sizes = _await_files(uri, names, 2 * PATIENCE)  # the others may be waiting for storage themselves
            complete = marker | {"files": sizes}
            storage.patiently(storage.write_json, storage.join(uri, MARKER), complete)
            self._saved(step, uri)
            storage.patiently(self._remove_old)

    def _remove_old(self) -> None:
        saved = find(self.place)
        keep = {entry.step for entry in saved[: self.config.keep_last]} | {entry.step for entry in best(saved)}
        for entry in saved:
            if entry.step not in keep:
                storage.remove(storage.join(entry.uri, MARKER))  # first: without it, the folder is no checkpoint
                storage.remove(entry.uri)


def best(saved: list[Saved]) -> list[Saved]:
    """The checkpoint with the highest score, the newest one in a tie; none if none has a score."""
    scored = [entry for entry in saved if entry.score is not None]
    return sorted(scored, key=lambda entry: (entry.score, entry.step))[-1:]


def restore(state: TrainState, saved: Saved) -> None:
    """Restore ``state`` from what was ``saved``, whatever the number of workers then and now."""
    state.averager.count = saved.counters["averaged"]
    for name in _COUNTERS:
        setattr(state, name, saved.counters[name])
    state.averager.averaged = {}
    if state.averager.count:
        state.averager.averaged = {name: torch.empty_like(p, dtype=torch.float32) for name, p in state.model.named_parameters()}
    with _fetched(storage.join(saved.uri, DENSE)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    _fill(_weights(state, of_rows=False), tensors, saved)
    state.optimizer.load_dense_state({name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")})
    rows, own = _rows(state), state.model.recall.own
    for part in range(saved.workers):
        theirs = part_of(state.model.recall.n_groups, part, saved.workers)
        first, last = max(own.start, theirs.start), min(own.stop, theirs.stop)
        if first < last:
            with _fetched(storage.join(saved.uri, _rows_file(part, saved.workers))) as file:
                slices = {name: file.get_slice(name)[first - theirs.start : last - theirs.start] for name in rows}
            _fill({name: tensor[first - own.start : last - own.start] for name, tensor in rows.items()}, slices, saved)


@torch.no_grad()
def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], saved: Saved) -> None:
    for name, target in targets.items():
        if name not in tensors or tensors[name].shape != target.shape:
            found = tuple(tensors[name].shape) if name in tensors else f"no {name}"
            raise ModelError(
                "the checkpoint is of another model",
                where=saved.uri,
                found=found,
                expected=f"{name} {tuple(target.shape)}",
                way_out="resume with the release that wrote it, or start over: another output, --resume never",
            )
        target.copy_(tensors[name])


def _rows(state: TrainState) -> dict[str, Tensor]:
    """The state that only this worker has: rows, lift, averages, accumulators; their first dimension is its own groups."""
    return _weights(state, of_rows=True) | {f"optimizer.{name}": part for name, part in state.optimizer.rows.square.items()}


def _weights(state: TrainState, of_rows: bool) -> dict[str, Tensor]:
    """Weights and their averages: those of the rows that this worker owns, or those that all workers share."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, tensors in (("model", state.model.state_dict()), ("averaged", state.averager.averaged))
        for name, tensor in tensors.items()
        if (name.partition(".")[0] in state.model.heads) == of_rows
    }


def _save(tensors: dict[str, Tensor], folder: str, name: str) -> None:
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, Path(folder, name))


class _IncompleteError(Exception):
    """A folder is not a complete checkpoint."""


def _folders(place: str) -> dict[int, dict[str, int]]:
    """The files in each checkpoint's folder: sizes by name, by step."""
    folders: dict[int, dict[str, int]] = {}
    for file in storage.all_files(place):
        if match := _FOLDER.search(file.uri):
            folders.setdefault(int(match[1]), {})[match[2]] = file.size
    return folders


def _read(uri: str, sizes: dict[str, int]) -> Saved:
    if MARKER not in sizes:
        raise _IncompleteError("unfinished, it has no checkpoint.json")
    try:
        marker = json.loads(storage.read_bytes(storage.join(uri, MARKER)))
        version, files = int(marker["xmc_ray_checkpoint"]), dict(marker["files"])
        if version == FORMAT:
            saved = Saved(uri=uri, **{name: marker[name] for name in ("workers", "counters", "identity", "score", "metrics")})
    except (ValueError, KeyError, TypeError) as error:
        raise _IncompleteError(f"checkpoint.json cannot be read ({error!r})") from None
    if version != FORMAT:
        over = "resume with the release that wrote it, or start over: another output, --resume never"
        age, way_out = ("a newer", "upgrade xmc_ray") if version > FORMAT else ("an earlier", over)
        raise ModelError(f"the checkpoint is of {age} format", where=uri, found=version, expected=FORMAT, way_out=way_out)
    for name, size in files.items():
        if sizes.get(name) != size:
            found = f"{sizes[name]:,} bytes" if name in sizes else "no such file"
            raise _IncompleteError(f"cut short, {name}: found {found}, expected {size:,} bytes")
    return saved


def _await_files(uri: str, names: set[str], seconds: float) -> dict[str, int]:
    """The size of each of these files, once the other workers have written theirs; DataError if one is late."""
    deadline = time.monotonic() + seconds
    while True:
        files = storage.patiently(storage.all_files, uri, seconds=seconds)
        sizes = {file.uri.rpartition("/")[2]: file.size for file in files}
        missing = names - set(sizes)
        if not missing:
            return {name: sizes[name] for name in sorted(names)}
        if time.monotonic() > deadline:
            raise DataError("a checkpoint is not complete", where=uri, found=f"no {', '.join(sorted(missing))}")
        time.sleep(_POLL)


@contextmanager
def _fetched(uri: str) -> Iterator[Any]:
    """An open safetensors file at any address; its local copy is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder, safe_open(folders.local_copy(uri, folder), framework="pt") as file:
        yield file


def _name(step: int) -> str:
    return f"step-{step:09}"


def _rows_file(rank: int, world: int) -> str:
    return f"rows-{rank:05}-of-{world:05}.safetensors"

"""A training job's callbacks: told in the driver what the run folder's journal holds, each figure once.

Figures reach callbacks after the journal has been copied to the run folder (`journal`), so a driver that is killed leaves
nothing with them that the next one would not find there. A run that resumes at an earlier step computes some steps again; what
the journal has of them already is not told again. ``callbacks.json`` holds the id by which trackers know the run.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from xmc_ray import storage
from xmc_ray.callbacks.callback import Callback, Run, Trained, flat
from xmc_ray.callbacks.calls import Calls, InBackground
from xmc_ray.errors import XmcError
from xmc_ray.on_ray.session import find_own
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.journal import say

FILE = "callbacks.json"

_PATIENCE, _HURRY = 300.0, 15.0  # seconds for the last calls of a run: of one that is done, of one that an error has ended


class Follower:
    """The callbacks of a run, none of which can hold it up or end it."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.call = InBackground(Calls(callbacks, say))
        self._told = (-1, False)  # up to where in the journal

    def begin(self, config: TrainConfig) -> None:
        """Tell of the run. Where it began without callbacks, what its journal has is told as well."""
        uri, journal = storage.join(config.output, FILE), storage.join(config.output, "metrics.jsonl")
        known = storage.exists(uri)
        entries = [*_entries(storage.read_bytes(journal))] if storage.exists(journal) else []
        identity = {"id": storage.read_json(uri)["run"]} if known else {}
        name = "/".join(config.output.rstrip("/").split("/")[-2:])
        run = Run(name=name, settings=flat(asdict(config)), output=config.output, resumed=bool(entries), **identity)
        if not known:
            storage.write_json(uri, {"run": run.id})
        self.call("on_train_start", run)
        if known:
            self._told = max(map(_position, entries), default=self._told)
        else:
            for entry in entries:
                self.tell(entry)

    def tell(self, entry: dict[str, Any]) -> None:
        """Tell of an entry of the journal, or of a checkpoint, unless it has been told."""
        if "checkpoint" in entry:
            self.call("on_checkpoint", entry["step"], entry["checkpoint"])
            return
        if _position(entry) <= self._told:
            return
        self._told = _position(entry)
        prefix, step = "validation/", entry["step"]
        metrics = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        if metrics:
            self.call("on_validation", step, metrics)
        self.call(
            "on_log", step, {name: value for name, value in entry.items() if name != "step" and not name.startswith(prefix)}
        )

    def end(self, config: TrainConfig, fingerprint: str) -> None:
        """Tell of the bundle, and of the report if there is one."""
        bundle, report = (storage.join(config.output, name) for name in ("bundle", "report.html"))
        metrics: dict[str, Any] = {}
        files = {"README.md": storage.join(bundle, "README.md")}
        try:
            metrics = flat(storage.read_json(storage.join(bundle, "metrics.json")), "/")
            files |= {"report.html": report} if storage.exists(report) else {}
        except XmcError as error:  # the bundle is complete: no reason to fail
            say(f"warning: callbacks are told of the bundle without its metrics: {error}")
        figures = {name: value for name, value in metrics.items() if type(value) in (int, float)}
        self.call("on_train_end", Trained(metrics=figures, bundle=bundle, fingerprint=fingerprint, files=files))


@contextmanager
def followed(config: TrainConfig, callbacks: list[Callback]) -> Iterator[Follower]:
    """Callbacks are told of what happens within; at its end they get some time for what is left to do."""
    follower = Follower(callbacks)
    try:
        if callbacks:
            follower.begin(config)
        yield follower
    except BaseException as error:
        follower.call("on_exception", find_own(error) or error)
        follower.call.close(_HURRY)
        raise
    if not follower.call.close(_PATIENCE):
        say(f"warning: callbacks have not ended after {_PATIENCE:.0f} s, and are left")


def _entries(journal: bytes) -> Iterator[dict[str, Any]]:
    for line in journal.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut short
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry


def _position(entry: dict[str, Any]) -> tuple[int, bool]:
    """A step has at most two entries, its losses first and its validation after them (`Curves.read`)."""
    return entry["step"], "loss" not in entry

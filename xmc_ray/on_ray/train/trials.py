"""Trials of recipes, side by side on Ray Tune.

Each leaves ``<recipe>.json``, what it reached, and, if it was finished, ``<recipe>.parquet``, its held-out predictions.
"""

import os
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import Any

import pyarrow as pa
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler

from xmc_ray import storage
from xmc_ray.data.groups import group_labels
from xmc_ray.data.token_cache import Split
from xmc_ray.errors import ModelError
from xmc_ray.exits import keep_signals
from xmc_ray.on_ray.session import find_own, is_cluster
from xmc_ray.on_ray.train.config import WorkersConfig
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.training.fit import FitConfig, in_chunks
from xmc_ray.training.recipe import Candidate
from xmc_ray.training.tuning import FINISHED, HELD_OUT, QUARTERS, Round, Trial, run_trial, timed

_RANKER = 0.015  # what a linear ranker, which comes at the end, adds to the mean figure of words alone (decision 0021)
_REPORTED = ("figures", "lift", "weight", "documents", "passes", "rate")


def slots(workers: WorkersConfig) -> int:
    """Trials that fit side by side: a core each, or a worker's resources if those are GPUs."""
    total = ray.cluster_resources()
    if workers.gpu:
        return max(1, int(total.get("GPU", 0)))
    return max(1, int(total.get("CPU", 1)) if is_cluster() else len(os.sched_getaffinity(0)))


def tried(prepared: Prepared, workers: WorkersConfig, round_: Round, folder: str) -> list[Trial]:
    """The trials of a round; those that are on record in ``folder`` are not repeated.

    ``prepared``: documents to train on, and held-out ones that judge; ``workers``: those of the training that is to follow.
    Raises the first error if all have failed.
    """
    recipes = round_.recipes
    records = [record_of(folder, recipe) for recipe in recipes]
    missing = [number for number, uri in enumerate(records) if not storage.exists(uri)]
    if missing:
        limited = [timed(recipe.config, round_.minutes) for recipe in recipes]
        needs = workers.needs if workers.gpu else {"CPU": 1.0}
        shared = {"configs": limited, "prepared": prepared, "documents": round_.documents}
        shared |= {"records": records, "device": workers.device.type}
        trainable = ray.tune.with_parameters(_trial, **shared)
        stopping = ASHAScheduler(max_t=QUARTERS, grace_period=QUARTERS // 2, reduction_factor=2) if round_.stops else None
        # Ray Tune takes Ctrl-C for the end of all trials, and prints a table and the address of a folder that will not stay.
        with tempfile.TemporaryDirectory() as scratch, keep_signals(), redirect_stdout(StringIO()):
            results = ray.tune.Tuner(
                ray.tune.with_resources(trainable, needs),
                param_space={"number": ray.tune.grid_search(missing)},
                tune_config=ray.tune.TuneConfig(
                    metric="score",
                    mode="max",
                    scheduler=stopping,
                    max_concurrent_trials=slots(workers),
                ),
                run_config=ray.tune.RunConfig(name="trials", storage_path=scratch, verbose=0),
            ).fit()
        ended = {(result.config or {})["number"]: result for result in map(results.__getitem__, range(len(results)))}
        unfinished = {number: _unfinished(result) for number, result in ended.items() if not storage.exists(records[number])}
        recorded = [Trial(**storage.read_json(uri)) for uri in records if storage.exists(uri)]
        if results.errors and round_.stops and not any(trial.figures for trial in [*recorded, *unfinished.values()]):
            raise results.errors[0]  # and nothing is recorded: another attempt may have more memory
        for number, trial in unfinished.items():
            storage.write_json(records[number], asdict(trial))
    return [Trial(**storage.read_json(uri)) for uri in records]


def _unfinished(result: ray.tune.Result) -> Trial:
    """A trial that Ray Tune stopped, by its last report, or one that failed."""
    last = result.metrics or {}
    if result.error is None and "figures" in last:
        return Trial("stopped, behind the others", **{name: last[name] for name in _REPORTED})
    error = result.error or ModelError("the trial reported nothing")
    return Trial(f"failed: {find_own(error) or str(error).strip().splitlines()[-1]}")


def record_of(folder: str, recipe: Candidate) -> str:
    """The address of what the trial of a recipe reached."""
    return storage.join(folder, f"{recipe.name.replace(' ', '-')}.json")


def predictions_of(record: str) -> str:
    """The address of the held-out predictions of a finished trial."""
    return f"{record.removesuffix('.json')}.parquet"


def _trial(
    space: dict[str, Any],
    *,
    configs: list[FitConfig],
    prepared: Prepared,
    documents: int,
    records: list[str],
    device: str,
) -> None:
    """Try recipe ``space["number"]`` on ``documents`` random documents, reporting to Ray Tune after each quarter.

    A trial that finishes leaves its record itself, for a job that is killed before the others have finished.
    """
    recipe, record = configs[space["number"]], records[space["number"]]
    torch.set_num_threads(1)
    part, held_out = _some(prepared, "train", documents), _some(prepared, "validation", HELD_OUT)
    tokens, truth = ([*in_chunks(part[name].combine_chunks())] for name in ("tokens", "labels"))
    groups = group_labels(recipe.groups, tokens, truth, len(prepared.labels))  # of the part: those of everything take minutes
    head_start = _RANKER if recipe.linear.candidates and recipe.encoder.layers == 0 else 0.0
    for trial, calibration in run_trial(recipe, prepared.tokenizer, prepared.labels, groups, part, held_out, device):
        if trial.state == FINISHED:
            table = calibration.to_table(prepared.labels.fingerprint)
            storage.patiently(storage.write_parquet, predictions_of(record), table)
            storage.patiently(storage.write_json, record, asdict(trial))
        ray.tune.report({"score": trial.score + (0.0 if trial.state == FINISHED else head_start)} | asdict(trial))


def _some(prepared: Prepared, split: Split, documents: int) -> pa.Table:
    """Random documents of a split: ``tokens`` and ``labels``, list<int32> each. All were shuffled before some were held out."""
    tokens = prepared.tokens
    return pa.concat_tables(tokens.chunks(split, tokens.some(split, documents))).slice(0, documents).combine_chunks()

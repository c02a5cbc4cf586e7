"""From checkpoints to a bundle: the best model of a run, calibrated on held-out documents that were not used to choose it.

Calibration depends a little on the arithmetic of the scores, and takes the time of predicting thousands of documents. So they
are predicted with the settings of a training worker: on a cluster by a task with its resources, since the driver has none.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import torch

from xmc_ray import storage
from xmc_ray.bundle.content import Bundle, save_bundle
from xmc_ray.bundle.folder import MARKER
from xmc_ray.command import to_toml
from xmc_ray.data.labels import IntArray, LabelIndex
from xmc_ray.errors import ModelError
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.metrics.calibration import Calibration, Predictions, calibration_metrics, cross_fitted
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import LinearRanker
from xmc_ray.model.predict import computed_by, predict
from xmc_ray.model.svm import Examples, Weights, examples_of, joined, ranker_of, solved
from xmc_ray.model.threads import mapped
from xmc_ray.on_ray.session import is_cluster, make_room
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.training.checkpoint import Saved, best, find, restore
from xmc_ray.training.fit import build_model, predictions_and_hits
from xmc_ray.training.loop import TrainState

T = TypeVar("T")

_MOST = 16_384  # documents for calibration


def keep_best(config: TrainConfig, prepared: Prepared, confirm: Callable[[], None] = lambda: None) -> str:
    """Save the best checkpoint of a run, or the last one without validation, as its bundle; the bundle's fingerprint.

    An unfinished bundle of an earlier attempt is replaced. ``confirm``: see `save_bundle`. Raises ModelError without a
    checkpoint.
    """
    run_toml, config = to_toml(config), config.settled()
    checkpoints, uri = (storage.join(config.output, name) for name in ("checkpoints", "bundle"))
    saved = find(checkpoints, say)
    if not saved:
        raise ModelError("training has left no checkpoint", where=checkpoints)
    chosen = (best(saved) or saved)[0]
    ranker = _linear_ranker(chosen, config, prepared) if config.linear.candidates else None
    calibration, measured = _calibration(chosen, config, prepared, ranker)
    model = _model_of(chosen, config, prepared, ranker).eval()
    metrics: dict[str, Any] = dict(chosen.metrics) | {"step": chosen.step, "calibration": measured}
    if ranker is not None and prepared.counts["validation"]:  # the checkpoint's are of the model without it
        metrics |= ask_a_worker(config, validated, chosen, config, prepared, ranker)
    metrics["documents"] = {name: count for name, count in prepared.counts.items() if count}
    if prepared.feedback is not None:
        metrics["feedback"] = prepared.feedback
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    bundle = Bundle(model, *parts, metrics=metrics, run_toml=run_toml, calibration=calibration)
    if not storage.is_empty(uri):
        storage.remove(uri, last=MARKER)  # an unfinished bundle of this run
    return save_bundle(bundle, uri, confirm)


def _model_of(saved: Saved, config: TrainConfig, prepared: Prepared, ranker: LinearRanker | None = None) -> LightXML:
    heads = config.model
    if heads.table == "auto":  # as on the workers
        heads = replace(heads, table="bfloat16" if config.workers.gpu else "float32")
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    model = build_model(replace(config, model=heads), *parts, weight_F=prepared.term_weights)
    state = TrainState.start(model, config.optim)
    restore(state, saved)
    state.averager.keep(model)
    model.linear = ranker
    return model


def _linear_ranker(saved: Saved, config: TrainConfig, prepared: Prepared) -> LinearRanker:
    """The linear ranker of a checkpoint's model, by tasks as large as workers: some documents each, then some labels each."""
    workers = config.workers
    say(f"training the linear ranker on {prepared.counts['train']:,} documents")
    make_room("workers", 1, workers.needs, workers.patience)
    take: Any = ray.remote(take_examples).options(**workers.resources)
    solve: Any = ray.remote(solve_labels).options(**workers.resources)
    shared = ray.put((saved, config, prepared))
    parts = np.array_split(np.arange(prepared.tokens.n_chunks("train")), workers.count)
    side_by_side = 1 if is_cluster() else workers.count  # on a machine
    examples = [take.remote(shared, chunks, side_by_side) for chunks in parts if len(chunks)]
    cuts = np.linspace(0, len(prepared.labels), workers.count + 1).astype(int).tolist()
    solved_parts = [solve.remote(config, range(first, end), side_by_side, *examples) for first, end in pairwise(cuts)]
    return ranker_of(ray.get(solved_parts), config.linear)


def take_examples(shared: tuple[Saved, TrainConfig, Prepared], chunks: IntArray, side_by_side: int) -> Examples:
    """What the linear ranker learns from the documents in ``chunks`` of the training split."""
    saved, config, prepared = shared
    device = settle(config, side_by_side)
    model = (
        _model_of(saved, config, prepared).to(device).eval()
    )  # for good: threads that predict must not turn dropout on again
    documents = prepared.tokens.chunks("train", chunks)
    return joined([*mapped(lambda chunk: examples_of(model, chunk, config.linear, config.loop.prediction), documents)])


def solve_labels(config: TrainConfig, labels: range, side_by_side: int, *examples: Examples) -> Weights:
    """The linear ranker's weights of some labels."""
    threads = config.threads(side_by_side)  # which do not wait for each other
    return solved(joined(examples), labels, config.linear, threads, config.feedback.judged_weight)


def validated(saved: Saved, config: TrainConfig, prepared: Prepared, ranker: LinearRanker) -> dict[str, float]:
    """The metrics in validation of a checkpoint's model with its linear ranker."""
    model, metrics = _model_of(saved, config, prepared, ranker), Metrics(prepared.labels.counts, prepared.labels.n_documents)
    model.to(settle(config))
    for chunk in prepared.tokens.chunks("validation"):
        tokens, truth = (chunk[name].combine_chunks() for name in ("tokens", "labels"))
        metrics.update(predict(model, tokens, max(metrics.ks), config.loop.prediction)[1], truth)
    return {name: value for name, value in metrics.result()["total"].items() if isinstance(value, float)}


def _calibration(
    saved: Saved, config: TrainConfig, prepared: Prepared, ranker: LinearRanker | None
) -> tuple[Calibration | None, dict[str, Any]]:
    """The calibration and its entry in `metrics.json`; no calibration without held-out documents."""
    if config.calibration is not None:
        calibration = calibration_of_another(config.calibration, prepared.labels)
        counts = {"documents": 0, "predictions": len(calibration), "bands": calibration.sizes()}
        return calibration, counts | {"arithmetic": calibration.arithmetic, "taken_from": config.calibration}
    if not len(prepared.tokens.some("calibration", _MOST)):
        return None, {"documents": 0, "predictions": 0}
    predicted, by = ask_a_worker(config, predict_held_out, saved, config, prepared, ranker)
    calibration = Calibration.of(*predicted, prepared.labels.counts, by)
    counts = {"documents": len(predicted[0]), "predictions": len(calibration), "bands": calibration.sizes(), "arithmetic": by}
    return calibration, counts | calibration_metrics(calibration, cross_fitted(predicted, prepared.labels.counts))


def calibration_of_another(uri: str, labels: LabelIndex) -> Calibration:
    """That of another model of the same labels. Raises DataError if it cannot be read, ModelError if it is of other labels."""
    return Calibration.of_another(storage.read_parquet(uri), labels.fingerprint, labels.counts, uri)


def ask_a_worker(config: TrainConfig, function: Callable[..., T], *arguments: Any) -> T:
    """What ``function`` returns on the resources of a worker; here, where torch is loaded, if this machine is all there is."""
    if not is_cluster():
        return function(*arguments)
    workers = config.workers
    make_room("workers", 1, workers.needs, workers.patience)
    answer: T = ray.get(ray.remote(function).options(**workers.resources).remote(*arguments))
    return answer


def predict_held_out(
    saved: Saved, config: TrainConfig, prepared: Prepared, ranker: LinearRanker | None = None
) -> tuple[Predictions, str]:
    """Predictions of documents held out for calibration by the model of a checkpoint, and their arithmetic.

    In the precision of training, on the device of a worker.
    """
    device, tokens = settle(config), prepared.tokens
    table = pa.concat_tables(tokens.chunks("calibration", tokens.some("calibration", _MOST)))
    documents, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    model, prediction = _model_of(saved, config, prepared, ranker).to(device), config.loop.prediction
    predicted = predictions_and_hits(model, documents, truth, len(prepared.labels), prediction)
    return predicted, computed_by(model, prediction.precision)


def settle(config: TrainConfig, side_by_side: int = 1) -> torch.device:
    """Use the threads of one of so many workers of a machine; its device."""
    config.use_threads(side_by_side)
    return config.workers.device

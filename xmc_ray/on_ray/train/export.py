"""From checkpoints to a bundle: the best model of a run, calibrated on held-out documents that were not used to choose it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER, Bundle, save_bundle
from xmc_ray.command import to_toml
from xmc_ray.errors import ModelError
from xmc_ray.metrics.calibration import Calibration, calibration_metrics, cross_fitted
from xmc_ray.model.lightxml import LightXML
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.training.checkpoint import Saved, best, find, restore
from xmc_ray.training.fit import build_model, predictions_and_hits
from xmc_ray.training.loop import TrainState

_MOST = 16_384  # documents for calibration, which the driver predicts


def keep_best(config: TrainConfig, prepared: Prepared, confirm: Callable[[], None] = lambda: None) -> str:
    """Save the best checkpoint of a run, or the last one without validation, as its bundle; the bundle's fingerprint.

    An unfinished bundle of an earlier attempt is replaced. ``confirm``: see `save_bundle`. Raises ModelError without a
    checkpoint.
    """
    checkpoints, uri = (storage.join(config.output, name) for name in ("checkpoints", "bundle"))
    saved = find(checkpoints, say)
    if not saved:
        raise ModelError("training has left no checkpoint", where=checkpoints)
    chosen = (best(saved) or saved)[0]
    model = _model_of(chosen, config, prepared).eval()
    calibration, measured = _calibration(model, config, prepared)
    metrics: dict[str, Any] = dict(chosen.metrics) | {"step": chosen.step, "calibration": measured}
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    bundle = Bundle(model, *parts, metrics=metrics, run_toml=to_toml(config), calibration=calibration)
    if not storage.is_empty(uri):
        storage.remove(uri, last=MARKER)  # an unfinished bundle of this run
    return save_bundle(bundle, uri, confirm)


def _model_of(saved: Saved, config: TrainConfig, prepared: Prepared) -> LightXML:
    heads = config.model
    if heads.table == "auto":  # as on the workers
        heads = replace(heads, table="bfloat16" if config.workers.gpu else "float32")
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    model = build_model(replace(config, model=heads), *parts, weight_F=prepared.term_weights)
    state = TrainState.start(model, config.optim)
    restore(state, saved)
    state.averager.keep(model)
    return model


def _calibration(model: LightXML, config: TrainConfig, prepared: Prepared) -> tuple[Calibration | None, dict[str, Any]]:
    """The calibration and its entry in `metrics.json`; no calibration without held-out documents."""
    tokens, counts_L = prepared.tokens, prepared.labels.counts
    chunks = tokens.some("calibration", _MOST)
    if not len(chunks):
        return None, {"documents": 0, "predictions": 0}
    table = pa.concat_tables(tokens.chunks("calibration", chunks))
    documents, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    predicted = predictions_and_hits(model, documents, truth, len(prepared.labels), config.loop.prediction)
    calibration = Calibration.of(*predicted, counts_L)
    counts = {"documents": len(documents), "predictions": len(calibration), "bands": calibration.sizes()}
    return calibration, counts | calibration_metrics(calibration, cross_fitted(predicted, counts_L))

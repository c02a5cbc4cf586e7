"""From checkpoints to a bundle: the best model of a run, calibrated on held-out documents that were not used to choose it."""

from dataclasses import replace
from typing import Any

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.bundle.folder import MARKER, Bundle, save_bundle
from xmc_ray.errors import ModelError
from xmc_ray.metrics.calibration import Calibration, calibration_metrics, cross_fitted
from xmc_ray.model.lightxml import LightXML
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.training.checkpoint import Saved, best, find, restore
from xmc_ray.training.fit import FitConfig, build_model, predictions_and_hits
from xmc_ray.training.loop import TrainState

_MOST = 16_384  # documents for calibration, which the driver predicts


def keep_best(fit: FitConfig, gpu: bool, prepared: Prepared, place: str, uri: str, run_toml: str) -> str:
    """Save the best checkpoint at ``place``, or the last one without validation, as a bundle at ``uri``; its fingerprint.

    ``gpu``: whether the workers had GPUs. An unfinished bundle that another attempt of the run has left at ``uri`` is replaced.
    Raises ModelError without a checkpoint.
    """
    saved = find(place, say)
    if not saved:
        raise ModelError("training has left no checkpoint", where=place)
    chosen = (best(saved) or saved)[0]
    model = _model_of(chosen, fit, gpu, prepared).eval()
    calibration, measured = _calibration(model, fit, prepared)
    metrics: dict[str, Any] = dict(chosen.metrics) | {"step": chosen.step, "calibration": measured}
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    bundle = Bundle(model, *parts, metrics=metrics, run_toml=run_toml, calibration=calibration)
    if not storage.is_empty(uri):
        storage.remove(uri, last=MARKER)  # an unfinished bundle of this run
    return save_bundle(bundle, uri)


def _model_of(saved: Saved, fit: FitConfig, gpu: bool, prepared: Prepared) -> LightXML:
    heads = fit.model
    if heads.table == "auto":  # as on the workers
        heads = replace(heads, table="bfloat16" if gpu else "float32")
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    model = build_model(replace(fit, model=heads), *parts, weight_F=prepared.term_weights)
    state = TrainState.start(model, fit.optim)
    restore(state, saved)
    state.averager.keep(model)
    return model


def _calibration(model: LightXML, fit: FitConfig, prepared: Prepared) -> tuple[Calibration | None, dict[str, Any]]:
    """The calibration and its entry in `metrics.json`; no calibration without held-out documents."""
    tokens, counts_L = prepared.tokens, prepared.labels.counts
    chunks = tokens.some("calibration", _MOST)
    if not len(chunks):
        return None, {"documents": 0, "predictions": 0}
    table = pa.concat_tables(tokens.chunks("calibration", chunks))
    documents, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    predicted = predictions_and_hits(model, documents, truth, len(prepared.labels), fit.loop.prediction)
    calibration = Calibration.of(*predicted, counts_L)
    counts = {"documents": len(documents), "predictions": len(calibration), "bands": calibration.sizes()}
    return calibration, counts | calibration_metrics(calibration, cross_fitted(predicted, counts_L))

"""From checkpoints to a bundle: the best model of a run, its scores calibrated on documents that nothing was chosen by."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xmc_ray import storage
from xmc_ray.bundle import MARKER, Bundle, save_bundle
from xmc_ray.calibration import PRECISIONS, Calibration, Reliability, Selection
from xmc_ray.checkpoint import Saved, best, find, restore
from xmc_ray.classifier import FitConfig, build_model, predictions_and_hits
from xmc_ray.errors import ModelError
from xmc_ray.journal import say
from xmc_ray.labels import IntArray
from xmc_ray.loop import TrainState
from xmc_ray.model import LightXML
from xmc_ray.preparation import Prepared
from xmc_ray.tokens import Split

_CHUNKS = 4  # of 4,096 documents are calibrated on, and measured on, at most: the job's own machine predicts them

Predictions = tuple[npt.NDArray[np.float32], IntArray, npt.NDArray[np.bool_]]
"""Scores, label ids, hits; [D, k] each."""


def keep_best(fit: FitConfig, gpu: bool, prepared: Prepared, place: str, uri: str, run_toml: str) -> str:
    """Make the best checkpoint at ``place``, or the last where nothing is held out, a bundle at ``uri``; its fingerprint.

    ``gpu``: whether the workers had GPUs. What another attempt of the run has left at ``uri`` is replaced. Raises ModelError
    without a checkpoint.
    """
    saved = find(place, say)
    if not saved:
        raise ModelError("training has left no checkpoint", where=place)
    chosen = (best(saved) or saved)[0]
    model = _model_of(chosen, fit, gpu, prepared).eval()
    calibration, told = _calibration(model, fit, prepared)
    figures: dict[str, Any] = dict(chosen.metrics) | {"step": chosen.step, "calibration": told}
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    bundle = Bundle(model, *parts, metrics=figures, run_toml=run_toml, calibration=calibration)
    if not storage.is_empty(uri):
        storage.remove(uri, last=MARKER)  # begun by this run, never finished
    return save_bundle(bundle, uri)


def _model_of(saved: Saved, fit: FitConfig, gpu: bool, prepared: Prepared) -> LightXML:
    heads = fit.model
    if heads.table == "auto":  # as it was on the workers
        heads = replace(heads, table="bfloat16" if gpu else "float32")
    parts = prepared.tokenizer, prepared.labels, prepared.groups
    model = build_model(replace(fit, model=heads), *parts, weight_F=prepared.term_weights)
    state = TrainState.start(model, fit.optim)
    restore(state, saved)
    state.averager.keep(model)
    return model


def _calibration(model: LightXML, fit: FitConfig, prepared: Prepared) -> tuple[Calibration | None, dict[str, Any]]:
    """The calibration, and what `metrics.json` says of it."""
    fitted_on = _predictions(model, fit, prepared, "calibration")
    if fitted_on is None:
        return None, {"documents": 0, "predictions": 0}
    calibration = Calibration.of(*fitted_on, prepared.labels.counts)
    told = {"documents": len(fitted_on[0]), "predictions": len(calibration), "bands": calibration.sizes()}
    return calibration, told | measure(calibration, _predictions(model, fit, prepared, "validation"))


def measure(calibration: Calibration, predicted: Predictions | None) -> dict[str, Any]:
    """ECE@5 before and after, and what thresholds for some precisions do, on documents that it was not fitted on.

    ``predicted``: their predictions with the model's own scores; None where there are none, then no figure is known.
    """
    before, after = Reliability(), Reliability()
    selections = {precision: Selection(calibration.thresholds(precision)) for precision in PRECISIONS}
    if predicted is not None:
        scores_Dk, labels_Dk, hit_Dk = predicted
        chances_Dk = calibration.calibrated(scores_Dk, labels_Dk)
        before.update(scores_Dk, labels_Dk, hit_Dk)
        after.update(chances_Dk, labels_Dk, hit_Dk)
        for selection in selections.values():
            selection.update(chances_Dk, labels_Dk, hit_Dk)
    return {
        "measured_on": 0 if predicted is None else len(predicted[0]),
        "ECE@5 before": before.result(),
        "ECE@5": after.result(),
        "thresholds": {str(precision): selection.result() for precision, selection in selections.items()},
    }


def _predictions(model: LightXML, fit: FitConfig, prepared: Prepared, split: Split) -> Predictions | None:
    """Of the documents of a split, at most `_CHUNKS` chunks; None where it has none."""
    tokens = prepared.tokens
    if not tokens.counts.get(split):
        return None
    n_chunks = tokens.n_chunks(split)
    table = pa.concat_tables(tokens.chunks(split, np.arange(min(n_chunks, _CHUNKS))))
    documents, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    return predictions_and_hits(model, documents, truth, len(prepared.labels), fit.loop)

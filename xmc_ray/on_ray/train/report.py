"""The end of a training run: the model predicts the held-out documents once more, for ``report.html``.

The bundle is written first, and a report that cannot be made is only a warning: it never fails a finished training.
"""

from dataclasses import asdict

from xmc_ray import storage
from xmc_ray.bundle.content import load_bundle
from xmc_ray.data.labels import IntArray
from xmc_ray.data.token_cache import TokenCache
from xmc_ray.metrics.confusion import Findings
from xmc_ray.model.predict import predict
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.export import ask_a_worker, settle
from xmc_ray.on_ray.train.journal import say
from xmc_ray.on_ray.train.prepare import Prepared
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.training import TrainingRun, training_report
from xmc_ray.training.advice import cut_off, everywhere, foreign, on_training


def write_report(config: TrainConfig, prepared: Prepared) -> None:
    """Write ``report.html`` beside the bundle of a run, or print why that is impossible."""
    uri = storage.join(config.output, "report.html")
    try:
        storage.write_bytes(uri, training_report(_collect(config, prepared)).encode())
    except Exception as error:  # any error: the run has its bundle, which does not depend on a page
        reason = (str(error).strip().splitlines() or [""])[-1]  # Ray says first where it came from
        say(f"warning: no {uri}: {type(error).__name__}: {reason}")
    else:
        say(f"report: {uri}")


def curves_of(output: str) -> Curves:
    """The journal of the run in ``output``, empty where it has none."""
    journal = storage.join(output, "metrics.jsonl")
    return Curves.read(storage.read_bytes(journal).splitlines() if storage.exists(journal) else [])


def advice_on_documents(config: TrainConfig, prepared: Prepared) -> list[str]:
    """What to say of documents that this model will read badly, or learn nothing from."""
    tokens, counts = prepared.tokens, prepared.counts
    documents = sum(counts.get(name, 0) for name in ("train", "validation", "calibration", "unlabelled"))
    (first,) = tokens.chunks("train", tokens.some("train", 1), ["tokens"])
    cut = cut_off(counts["truncated"], documents, config.text.max_tokens)
    language = foreign(prepared.tokenizer, first["tokens"].combine_chunks(), config.encoder.name)
    return [line for line in (cut, language, everywhere(prepared.labels)) if line]


def advice_on_training(curves: Curves) -> list[str]:
    """What to say of a run that has learnt nothing, or not all it could; nothing where its losses are unknown."""
    untrained, late, trained = map(curves.last, ("untrained_loss", "late_loss", "sample_loss"))
    return [] if untrained is None or trained is None else on_training(untrained, late, trained)


def _collect(config: TrainConfig, prepared: Prepared) -> TrainingRun:
    bundle, curves = storage.join(config.output, "bundle"), curves_of(config.output)
    advice = [*advice_on_training(curves), *advice_on_documents(config, prepared)]
    return TrainingRun(
        title=config.output.rstrip("/").rpartition("/")[2],
        bundle=storage.read_json(storage.join(bundle, "config.json"))["fingerprint"],
        step=storage.read_json(storage.join(bundle, "metrics.json"))["step"],
        documents=prepared.counts,
        curves=curves,
        warnings=[f"{line[0].upper()}{line[1:]}." for line in advice],
        findings=_held_out(bundle, config, prepared.tokens),
        labels=prepared.labels,
        groups=len(prepared.groups),
        text=prepared.tokenizer.decode,
        settings=asdict(config),
    )


def _held_out(bundle: str, config: TrainConfig, tokens: TokenCache) -> Findings | None:
    chunks = tokens.some("validation", config.report.documents)
    if not len(chunks):
        return None
    return ask_a_worker(config, _predict, bundle, config.settled(), tokens, chunks)


def _predict(bundle: str, config: TrainConfig, tokens: TokenCache, chunks: IntArray) -> Findings:
    """Predict some chunks of the held-out documents, one at a time, with the model of a bundle."""
    device, opened = settle(config), load_bundle(bundle)
    model = opened.model.to(device)
    findings = Findings(opened.labels, config.loop.seed)
    for chunk in tokens.chunks("validation", chunks):
        texts, truth = (chunk[name].combine_chunks() for name in ("tokens", "labels"))
        score_Dk, label_Dk = predict(model, texts, max(findings.metrics.ks), config.loop.prediction)
        scores = {"raw": score_Dk}
        if opened.calibration is not None:
            scores["calibrated"] = opened.calibration.calibrated(score_Dk, label_Dk)
        findings.update(texts, truth, label_Dk, scores)
    return findings

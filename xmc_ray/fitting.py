"""Fit a model in one process, on documents in memory; `XMCClassifier.fit` is its face."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from xmc_ray.bundle.content import Bundle
from xmc_ray.callbacks.callback import Callback
from xmc_ray.callbacks.fit import FollowedFit
from xmc_ray.data.feedback import Feedback, FeedbackConfig
from xmc_ray.data.groups import group_labels
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.errors import warn_caller
from xmc_ray.model.encoder import try_encoder
from xmc_ray.model.lexical import term_weights
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.precision import settled
from xmc_ray.model.svm import train_linear
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training.advice import LateLoss, cut_off, everywhere, foreign, on_training
from xmc_ray.training.fit import (
    RECENT,
    FitConfig,
    build_model,
    epoch_plan,
    in_chunks,
    progress_figures,
    sample_loss,
    share_of_batches,
)
from xmc_ray.training.loop import Step, TrainState, train
from xmc_ray.training.tuning import Choice, choose


@dataclass(frozen=True)
class Documents:
    """Documents and what is true of them.

    ``texts`` are strings or, of a model with fields, structs; ``truth`` and ``judged`` are list<int32>[D], ids of ``index``.
    """

    texts: pa.Array
    index: LabelIndex
    truth: pa.ListArray
    judged: pa.ListArray | None = None
    """Labels of which editors have said whether they are right; None without feedback."""
    feedback: str | None = None
    """The fingerprint of what editors have said."""

    @classmethod
    def of(cls, texts: pa.Array, lists: pa.ListArray, config: FeedbackConfig, ids: pa.StringArray | None) -> "Documents":
        """Of ``texts`` with their labels, list<string>[D]; the feedback that ``config`` names, by ``ids``, corrects these."""
        index = LabelIndex.count([lists])
        if config.uri is None or ids is None:
            return cls(texts, index, index.encode(lists))
        feedback = Feedback.read(config.uri)
        verdicts, found_V = feedback.of_documents(ids), np.zeros(len(feedback), bool)
        found_V[verdicts.flatten().to_numpy()] = True
        tally = feedback.tally(found_V, index.labels)
        if tally.left_out:
            warn_caller(str(tally))
        truth, _ = feedback.corrected(index.encode(lists), verdicts, index.labels)
        index = index.recounted(np.bincount(truth.flatten().to_numpy(), minlength=len(index)))
        return cls(texts, index, *feedback.corrected(index.encode(lists), verdicts, index.labels), feedback.fingerprint)

    def named(self, names: pa.Table | None) -> "Documents":
        """With display names of the labels."""
        return self if names is None else replace(self, index=self.index.with_names(names))


def fit(
    config: FitConfig,
    given: Documents,
    device: str,
    *,
    by_rule: bool = False,
    minutes: float | None = None,
    on_step: Callable[[Step], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Bundle:
    """Choose a recipe, if ``by_rule``, in so many ``minutes``; train, and warn of what the model could do better.

    Raises what `XMCClassifier.fit` does of documents and settings that have been checked.
    """
    tokenizer = Tokenizer.load(config.encoder.name, config.text.max_tokens, config.text.described())
    if not by_rule:
        try_encoder(config.encoder, tokenizer, settled(config.loop.precision, device))
    tokens, truncated = tokenizer.encode(given.texts)
    documents, is_labelled = _labelled(given, tokens)
    choice = Choice(config, "given")
    if by_rule:
        texts = given.texts.filter(is_labelled)
        choice = choose(config, minutes, texts, documents, given.index, tokenizer, device, warn_caller)
        config = choice.config
    tokens, truth = (documents[name].combine_chunks() for name in ("tokens", "labels"))
    groups = group_labels(config.groups, [tokens], [truth], len(given.index))
    epoch_plan(config.loop, len(documents)).check(config.loop.accumulate)
    weight_F = term_weights(in_chunks(tokens), config.lexical) if config.lexical.width else None
    model = build_model(config, tokenizer, given.index, groups, weight_F=weight_F, device=device)
    with FollowedFit(callbacks, asdict(config)) as followed:
        state, losses = _train(config, model, documents, on_step, followed)
        cut = cut_off(truncated.true_count, len(given.texts), config.text.max_tokens)
        language = foreign(tokenizer, tokens, config.encoder.name)
        for advice in filter(None, (*on_training(*losses), cut, language, everywhere(given.index))):
            warn_caller(advice)
        metrics: dict[str, Any] = {} if given.feedback is None else {"feedback": given.feedback}
        if by_rule:
            metrics |= {"recipe": choice.name, "trials": {name: asdict(trial) for name, trial in choice.trials.items()}}
        bundle = Bundle(model, tokenizer, given.index, groups, metrics=metrics, calibration=choice.calibration)
        figures = dict(zip(("untrained_loss", "late_loss", "sample_loss"), losses, strict=True))
        followed.end(figures | {"documents": state.documents, "seconds": state.seconds})
    return bundle


def _labelled(given: Documents, tokens: pa.ListArray) -> tuple[pa.Table, pa.BooleanArray]:
    """Columns of the documents of which something is known, as `share_of_batches` takes them, and which documents these are."""
    columns = {"tokens": tokens, "labels": given.truth} | ({} if given.judged is None else {"judged": given.judged})
    known_D = list_lengths(given.truth) + (0 if given.judged is None else list_lengths(given.judged))
    is_labelled = pa.array(known_D > 0)
    return pa.table(columns).filter(is_labelled), is_labelled


def _train(
    config: FitConfig, model: LightXML, documents: pa.Table, on_step: Callable[[Step], None] | None, followed: FollowedFit
) -> tuple[TrainState, tuple[float, float | None, float]]:
    """Train the model, its linear ranker included; the losses of a few training documents before, late in it and after."""
    plan, state = epoch_plan(config.loop, len(documents)), TrainState.start(model, config.optim)
    measure = partial(sample_loss, model, documents, config.loop.prediction)

    def averaged() -> float:
        with state.averager.in_use(model):
            return measure()

    untrained, late = measure(), LateLoss(averaged)
    batches_from = partial(share_of_batches, documents, plan, config.loop.epochs, exchange=model.exchange)
    recent = deque[tuple[float, float]](maxlen=RECENT)
    for step in train(state, model, batches_from, plan.steps, config.loop):
        late.update(step.progress)
        if on_step:
            on_step(step)
        recent.append((step.recall_loss, step.rank_loss))
        followed.log(step.number, partial(progress_figures, step, recent, state))
    followed.log_last()
    state.averager.keep(model.eval())
    if config.linear.candidates:
        model.linear = train_linear(model, documents, config.linear, config.loop.prediction)
    return state, (untrained, late.value, measure())

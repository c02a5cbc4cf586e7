"""What to say of a model that is worse than it could be, with what to change: None, or a sentence without a full stop.

The bounds are what small runs on the data sets at hand have shown (docs/quality.md).
"""

from collections.abc import Callable

import pyarrow as pa

from xmc_ray.data.labels import LabelIndex
from xmc_ray.model.tokenizer import Tokenizer

LATE = 2 / 3  # of training: from there on, the loss of a run that has settled hardly falls
_FALL = 0.03  # of the untrained loss
_CUT, _FOREIGN = 0.1, 0.2  # of the documents
_READ = 500  # documents whose language is looked at


def rise(untrained: float, trained: float) -> str | None:
    """Of a model whose `fit.sample_loss` is not below that of the untrained one."""
    if trained < untrained:
        return None
    return (
        f"the model is no better than an untrained one: the loss of a sample of training documents went from {untrained:.4g} "
        f"to {trained:.4g}; lower optim.rows_lr, optim.lexical_lr, optim.head_lr and optim.encoder_lr, or raise optim.warmup; "
        "if it has hardly moved, raise them or loop.epochs"
    )


def unsettled(untrained: float, late: float, trained: float) -> str | None:
    """Of a model that has learnt, but whose `fit.sample_loss` still fell from `LATE` to the end of training."""
    if trained >= untrained or late - trained < _FALL * untrained:
        return None
    fall = f"{(late - trained) / untrained:.0%}"
    return (
        f"training has not settled: in its last third the loss of a sample of training documents still fell by {fall} of what "
        f"it was untrained, from {late:.4g} to {trained:.4g}; raise loop.epochs, and the minutes if they are limited"
    )


def on_training(untrained: float, late: float | None, trained: float) -> list[str]:
    """`rise` and `unsettled`, where they apply; ``late`` is None where it was not measured."""
    lines = [rise(untrained, trained), None if late is None else unsettled(untrained, late, trained)]
    return [line for line in lines if line]


def cut_off(truncated: int, documents: int, max_tokens: int) -> str | None:
    """Of documents that are longer than the model reads."""
    if truncated <= _CUT * documents:
        return None
    return (
        f"{truncated / documents:.0%} of the documents are longer than {max_tokens:,} tokens, and the model does not read the "
        "rest; raise text.max_tokens (a transformer may read less: encoder.max_tokens)"
    )


def everywhere(labels: LabelIndex) -> str | None:
    """Of labels that every document has."""
    (ids,) = (labels.counts >= labels.n_documents).nonzero()
    if not len(ids):
        return None
    others = f" and {len(ids) - 1:,} other labels" if len(ids) > 1 else ""
    return (
        f"every document has {labels.labels[int(ids[0])]}{others}: nothing in a text speaks for or against such a label, and "
        "every text will get it; leave it out of the labels unless you want that"
    )


def foreign(tokenizer: Tokenizer, tokens: pa.ListArray, encoder: str) -> str | None:
    """Of documents (list<int32>[n], as encoded) in a language that the encoder's vocabulary hardly has."""
    share = tokenizer.foreign(tokens.slice(0, _READ))
    if share <= _FOREIGN:
        return None
    return (
        f"the encoder hardly knows the language of {share:.0%} of the documents: its tokenizer breaks their words into more "
        f"than two pieces on average, or has no token for them; set encoder.name to a model of this language (now {encoder})"
    )


class LateLoss:
    """Measures a loss when training passes `LATE`: ``value``, None before and in a run that was resumed after it."""

    def __init__(self, measure: Callable[[], float], resumed: bool = False) -> None:
        self.value: float | None = None
        self._measure, self._before = measure, 1.0 if resumed else 0.0

    def update(self, progress: float) -> None:
        """To be called after each step, on all workers alike."""
        if self._before < LATE <= progress:
            self.value = self._measure()
        self._before = progress

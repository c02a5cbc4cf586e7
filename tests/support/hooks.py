"""Hooks that score candidates, for the tests."""

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from xmc_ray.on_ray.tag.rerank import Candidates

SCORES: dict[str, float] = {"apple": 0.9, "pear": 0.8, "fruit": 0.1}
NOT_CALLABLE = 3


def by_label(candidates: Candidates) -> list[float]:
    """The scores above, or half the model's."""
    pairs = zip(candidates.labels.to_pylist(), candidates.scores.tolist(), strict=True)
    return [SCORES.get(label, score / 2) for label, score in pairs]


class InText:
    """1 for a label whose name, in lower case, is in the text; made once."""

    made = 0

    def __init__(self) -> None:
        InText.made += 1

    def __call__(self, candidates: Candidates) -> npt.NDArray[np.float64]:
        texts = candidates.texts.take(candidates.documents).to_pylist()
        names = pc.utf8_lower(candidates.names).to_pylist()
        return np.array([name in text for name, text in zip(names, texts, strict=True)], float)


class CannotBeMade:
    def __init__(self) -> None:
        raise OSError("no weights")


def fails(candidates: Candidates) -> list[float]:
    raise RuntimeError("out of luck")


def not_finite(candidates: Candidates) -> npt.NDArray[np.float32]:
    return np.where(np.arange(len(candidates.scores)) == 1, np.nan, candidates.scores)


def infinite(candidates: Candidates) -> npt.NDArray[np.float32]:
    return candidates.scores + np.inf


def logits(candidates: Candidates) -> npt.NDArray[np.float32]:
    return candidates.scores - 3


def too_few(candidates: Candidates) -> npt.NDArray[np.float32]:
    return candidates.scores[1:]


def in_words(candidates: Candidates) -> list[str]:
    return ["good"] * len(candidates.scores)


def far_too_large(candidates: Candidates) -> list[int]:
    return [10**400] * len(candidates.scores)


class _Guarded:
    def __array__(self, *_: object, **__: object) -> npt.NDArray[np.float32]:
        raise RuntimeError("requires grad")


def guarded(candidates: Candidates) -> _Guarded:
    """As a tensor of torch that requires a gradient."""
    return _Guarded()


def nothing(candidates: Candidates) -> None:
    return None

"""Why a document of a night got a tag: the explanation of the bundle that made the night, as bars of words."""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explain import explain
from xmc_ray.bundle.explanation import Explanation, bare
from xmc_ray.bundle.members import Members
from xmc_ray.errors import ModelError
from xmc_ray.model.predict import PredictConfig

_LOCK = threading.Lock()  # one explanation at a time, by one bundle in memory
_OPEN: dict[str, Ensemble] = {}


def why(manifest: Mapping[str, Any], text: str, label: str) -> Explanation:
    """Why the bundle of a night gives ``label`` to ``text``.

    Raises ModelError if that bundle is gone or another one by now, and ConfigError for a label that it does not know.
    """
    uris, fingerprint = manifest["config"]["bundle"], str(manifest["bundle"])
    with _LOCK:
        members = Members.read(uris)
        if members.fingerprint != fingerprint:
            what, found = "the bundle is not the one of this night any more", members.fingerprint
            raise ModelError(what, where=uris, found=found, expected=fingerprint)
        if fingerprint not in _OPEN:
            _OPEN.clear()
            _OPEN[fingerprint] = Ensemble.load(members)
        return explain(_OPEN[fingerprint], text, label, PredictConfig())


class Bar(NamedTuple):
    """A word, how often it occurs, its contribution, and that as a share of the largest one, with its sign."""

    word: str
    field: str | None
    times: int
    contribution: float
    share: float


def bars(explanation: Explanation, n: int = 14) -> list[Bar]:
    """The ``n`` words that count most, from the one that speaks most for the label to the one that speaks most against it."""
    read = [word for word in explanation.words if word.contribution is not None]
    most = sorted(read, key=lambda word: -abs(word.contribution or 0.0))[:n]
    largest = max((abs(word.contribution or 0.0) for word in most), default=0.0) or 1.0
    shown = [
        Bar(word.word, word.field, word.times, word.contribution or 0.0, (word.contribution or 0.0) / largest) for word in most
    ]
    return sorted(shown, key=lambda bar: -bar.contribution)


class Marked(NamedTuple):
    """A run of letters of the text as it stands, and how it is marked: ``for-1`` to ``against-3``, or not at all."""

    form: str
    mark: str = ""


def marked(explanation: Explanation, most: int = 2000) -> dict[str, list[Marked]]:
    """The text word by word, or each field of it by its name; at most so many words of each."""
    marks = {(bar.field, bar.word.casefold()): _mark(bar.share) for bar in bars(explanation, len(explanation.words))}
    texts = explanation.fields or {"": explanation.text}
    return {
        name: [Marked(form, marks.get((name or None, bare(form).casefold()), "")) for form in text.split()[:most]]
        for name, text in texts.items()
    }


def _mark(share: float) -> str:
    """Of a word's share of the largest contribution: below a twelfth it is not marked."""
    if abs(share) < 1 / 12:
        return ""
    return f"{'for' if share > 0 else 'against'}-{min(3, 1 + int(3 * abs(share)))}"

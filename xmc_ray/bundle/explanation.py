"""What an explanation says, and how it is printed: words, the label's path through each model, the nearest documents."""

import textwrap
from dataclasses import dataclass, field
from typing import NamedTuple

from xmc_ray.errors import one_line

_SHOWN, _WIDTH, _BAR = 12, 100, 24  # words, columns of text, columns of the longest bar
_PUNCTUATION = ".,:;!?()[]{}<>\"'`“”‘’«»…"


class Word(NamedTuple):
    """A word, how often it occurs in the text, and its contribution; None where the model has not read that far.

    ``field``: the one that the word is in; None in a text without fields, and the times are those in this field.
    """

    word: str
    times: int
    contribution: float | None
    field: str | None = None


@dataclass(frozen=True)
class Path:
    """How the label fared in one model. Ranks count from 1; ``others`` are the best other labels of the group, with scores.

    ``score`` = ``recall`` x ``rank_score`` x ``linear``, the linear ranker's factor, 1 without one. In flat mode the last three
    are empty, and the score is recall x linear.
    """

    bundle: str
    score: float
    rank: int
    recall: float
    group: int
    group_rank: int
    shortlist: int
    linear: float = 1.0
    rank_score: float | None = None
    rank_in_group: int | None = None
    others: tuple[tuple[str, float], ...] = ()


class Neighbour(NamedTuple):
    """A document with the label, and the cosine similarity of its features to those of the text."""

    text: str
    similarity: float


@dataclass(frozen=True)
class Explanation:
    """An explanation of one label for one text; ``str()`` formats it for a terminal.

    ``words`` are in the order of the text, ``fields`` its fields by name, if the models read any. ``log_odds`` are those of
    the score, the mean over the models; ``without_words`` those of a text without any word. ``score`` is uncalibrated;
    ``chance`` is the calibrated score, if all models have a calibration. ``notes`` say why the label is not predicted, why
    words have no contribution, or that ``chance`` was calibrated by another arithmetic.
    """

    text: str
    label: str
    name: str | None
    score: float
    chance: float | None
    n_labels: int
    log_odds: float
    without_words: float
    words: tuple[Word, ...]
    paths: tuple[Path, ...]
    notes: tuple[str, ...]
    neighbours: tuple[Neighbour, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        title = self.label if self.name in (None, self.label) else f"{self.label} ({self.name})"
        odds = f"log-odds {self.log_odds:+.2f}, without any word {self.without_words:+.2f}"
        chance = "" if self.chance is None else f", as a tag {self.chance:.4f}"
        parts = [[f"{title}: score {self.score:.4f}{chance}, {odds}", *(f"note: {note}" for note in self.notes)]]
        parts += [[line for path in self.paths for line in _path_lines(path, self.n_labels)]]
        parts += [self._word_lines(), self._neighbour_lines()]
        return "\n\n".join("\n".join(map(one_line, part)) for part in parts if part)

    def _word_lines(self) -> list[str]:
        read = [(word, word.contribution) for word in self.words if word.contribution is not None]
        read.sort(key=lambda pair: -abs(pair[1]))
        shown, rest = read[:_SHOWN], read[_SHOWN:]
        if not shown:
            return []
        longest = max(abs(shown[0][1]), 1e-9)
        lines = ["loss of log-odds when a word is left out:"]
        for word, contribution in sorted(shown, key=lambda pair: -pair[1]):
            bar = ("█" if contribution > 0 else "░") * max(1, round(_BAR * abs(contribution) / longest))
            lines.append(f"{contribution:+8.2f} {bar:{_BAR}} {_named(word)}" + (f" ×{word.times}" if word.times > 1 else ""))
        if rest:
            lines.append(f"{sum(contribution for _, contribution in rest):+8.2f} sum of {len(rest)} further words")
        lines.append("")
        signs = {(word.field, word.word.casefold()): f"{contribution:+.1f}"[0] for word, contribution in shown}
        for name, text in self.fields.items() or [(None, self.text)]:
            forms = [(form, signs.get((name, bare(form).casefold()))) for form in text.split()]
            marked = [form if sign is None else f"[{sign}{form}]" for form, sign in forms]
            lines += textwrap.wrap(" ".join(marked if name is None else [f"{name}:", *marked]), _WIDTH)
        return lines

    def _neighbour_lines(self) -> list[str]:
        if not self.neighbours:
            return []
        texts = [f"{near.similarity:8.3f} {textwrap.shorten(near.text, _WIDTH - 9)}" for near in self.neighbours]
        return ["nearest documents with this label, by cosine similarity of their features:", *texts]


def bare(form: str) -> str:
    """A word without the punctuation around it, unless it is nothing else."""
    return form.strip(_PUNCTUATION) or form


def _path_lines(path: Path, n_labels: int) -> list[str]:
    bundle, rank = f"bundle {path.bundle or '(not saved)'}: ", f"rank {path.rank:,} of {n_labels:,} labels"
    linear = "" if path.linear == 1 else f" x linear {path.linear:.4f}"
    if path.rank_score is None:
        factors = f" = recall {path.recall:.4f}{linear}" if linear else ""
        return [f"{bundle}score {path.score:.4f}{factors}, {rank}; flat: the label has no group"]
    others = ", ".join(f"{label} {score:.3f}" for label, score in path.others) or "none"
    return [
        f"{bundle}score {path.score:.4f} = recall {path.recall:.4f} x rank {path.rank_score:.4f}{linear}, {rank}",
        f"    recall: group {path.group} has rank {path.group_rank:,}; the first {path.shortlist:,} groups are shortlisted",
        f"    rank: {path.rank_in_group} in the group; others in it: {others}",
    ]


def _named(word: Word) -> str:
    return word.word if word.field is None else f"{word.field}: {word.word}"

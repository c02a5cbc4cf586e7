"""What each page shows: arguments of its address in, a template and its content out. Nothing here knows the web."""

import posixpath
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from xmc_ray import storage
from xmc_ray.errors import XmcError
from xmc_ray.metrics.live import Share
from xmc_ray.on_ray.tag.nights import REPORT, all_nights, day_of, latest_before
from xmc_ray.reports.charts import histogram
from xmc_ray.reports.curves import Curves
from xmc_ray.reports.render import Label, excerpt
from xmc_ray.reports.training import journal_warnings, training_charts
from xmc_ray.show import trends
from xmc_ray.show.feedback import feedback_of, live_precision
from xmc_ray.show.folder import BUNDLE, JOURNAL, SETTINGS, Found, find
from xmc_ray.show.labels import count_of, frequent
from xmc_ray.show.night import Night, count, drift, read_night, seconds
from xmc_ray.show.tags import PAGE, SECONDS, Position, Query, document, extremes, search
from xmc_ray.show.texts import Texts, look_up
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import FileInfo

_NIGHTS = 60  # latest ones in charts and tables
_LOOK_UP = 1.5  # seconds for the texts of a list of documents
_ONE = 10.0  # for that of a single one
_SHOWN = 10  # documents at either end of a label's scores
_LONG = 20_000  # letters of a text on its page


class Missing(Exception):
    """There is nothing at such an address."""


class Page(NamedTuple):
    """``crumbs``: the pages above, as (title, path, arguments)."""

    template: str
    title: str
    content: dict[str, Any]
    crumbs: Sequence[tuple[str, str, dict[str, str]]] = ()

    @classmethod
    def message(cls, title: str, words: str) -> "Page":
        """A page that says why there is no other."""
        return cls("message", title, {"words": words})


Arguments = Mapping[str, str]


class Site:
    """All pages over the runs and nights in ``root``."""

    def __init__(self, root: str) -> None:
        self.root, self._found = root, Found()

    def index(self, given: Arguments) -> Page:
        """Runs and outputs."""
        found = self._look()
        outputs = [(name, _days(output)) for name, output in found.outputs.items()]
        runs = [(name, storage.exists(join(run, BUNDLE, "config.json"))) for name, run in found.runs.items()]
        title = posixpath.basename(self.root) or self.root
        return Page("index", title, {"runs": runs, "outputs": outputs, "cut": found.cut})

    def run(self, given: Arguments) -> Page:
        """A training run: its curves, what its bundle reached, its settings."""
        name, folder = self._named(given, "runs")
        journal = join(folder, JOURNAL)
        curves = Curves.read(storage.read_bytes(journal).splitlines() if storage.exists(journal) else [])
        bundle = join(folder, BUNDLE)
        content = {
            "name": name,
            "is_finished": storage.exists(join(bundle, "config.json")),
            "step": curves.step,
            "figures": _last_figures(curves),
            "warnings": journal_warnings(curves),
            "charts": _training_charts(journal, storage.stat(journal).version) if curves.points else {},
            "settings": _text(join(folder, SETTINGS)),
            "card": _text(join(bundle, "README.md")),
            "has_report": storage.exists(join(folder, REPORT)),
        }
        return Page("run", name, content, _ABOVE)

    def nights(self, given: Arguments) -> Page:
        """The nights of an output over time."""
        name, output = self._named(given, "outputs")
        folders = all_nights(output)
        shown = [read_night(folder) for folder in folders[-_NIGHTS:]]
        precision = {night.day: self._precision(night, output) for night in shown}
        judged = {day: live.accepted / live.judged for day, live in precision.items() if live and live.judged}
        content = {
            "name": name,
            "nights": [(night, count(night.manifest, "in"), _row(night, judged)) for night in reversed(shown)],
            "left": len(folders) - len(shown),
            "trends": trends.trends(shown, judged),
        }
        return Page("nights", name, content, _ABOVE)

    def night(self, given: Arguments) -> Page:
        """One night: counts, reasons of rejects, scores, what has changed."""
        name, output, night = self._night(given)
        manifest, before = night.manifest, latest_before(night.folder)
        then = read_night(before) if before else None
        content = {
            "name": name,
            "night": night,
            "n": {name: count(manifest, name) for name in _COUNTS} if night.state == "finished" else {},
            "bundle": str(manifest.get("bundle", "unknown")),
            "changes": _counts(manifest.get("changes_since")),
            "reasons": _counts(manifest.get("reasons")),
            "scores": _histogram(manifest, then),
            "drifts": [(which, drift(manifest, since)) for which, since in _DRIFTS],
            "seconds": seconds(manifest),
            "precision": self._precision(night, output),
            "has_report": night.state == "finished" and storage.exists(join(night.folder, REPORT)),
            "before": then.day if then and then.state == "finished" else None,
        }
        return Page("night", night.day, content, _above_night(name))

    def documents(self, given: Arguments) -> Page:
        """Documents of a night that a query takes, a page of them."""
        name, _, night = self._night(given)
        _whole(night)
        query = Query(given.get("id", ""), given.get("label", ""), _share(given.get("least")), bool(given.get("untagged")))
        hits = search(night.files, query, _position(given.get("after")))
        texts = look_up(night.manifest, [row["id"] for row in hits.rows], _LOOK_UP) if hits.rows else Texts({})
        content = {
            "name": name,
            "night": night,
            "query": query,
            "hits": hits,
            "documents": [_shown(row, texts) for row in hits.rows],
            "texts": texts,
            "limits": (PAGE, SECONDS),
        }
        return Page("documents", "Documents", content, [*_above_night(name), (night.day, "/night", _at(name, night))])

    def document(self, given: Arguments) -> Page:
        """One document: its text and its tags."""
        name, _, night = self._night(given)
        row, texts = self._document(night, given.get("id", ""))
        content = {
            "name": name,
            "night": night,
            **_shown(row, texts, _LONG),
            "note": texts.note,
            "stale": _is_stale(row, texts),
        }
        return Page("document", row["id"], content, [*_above_night(name), (night.day, "/night", _at(name, night))])

    def labels(self, given: Arguments) -> Page:
        """The most frequent labels of a night that contain some letters."""
        name, _, night = self._night(given)
        _whole(night)
        containing = given.get("q", "")
        counts = frequent(night.folder, containing)
        content = {"name": name, "night": night, "q": containing, "counts": counts, "whole": count(night.manifest, "in") or 0}
        return Page("labels", "Labels", content, [*_above_night(name), (night.day, "/night", _at(name, night))])

    def label(self, given: Arguments) -> Page:
        """One label: over all nights, and its best and worst documents of one."""
        name, output, night = self._night(given)
        _whole(night)
        label = given.get("label", "")
        counts = [(day_of(folder), _count(folder, label)) for folder in all_nights(output)[-_NIGHTS:]]
        found = extremes(night.files, label, _SHOWN)
        texts = look_up(night.manifest, [each.id for each in (*found.best, *found.worst)], _LOOK_UP)
        points = trends.points((day, None if each is None else float(each.documents)) for day, each in counts)
        content = {
            "name": name,
            "night": night,
            "label": label,
            "count": count_of(night.folder, label),
            "found": found,
            "texts": {id: excerpt(text.readable) for id, text in texts.found.items()},
            "note": texts.note,
            "trend": trends.over_days({"documents": points}, "documents"),
            "budget": SECONDS,
        }
        above = [*_above_night(name), (night.day, "/night", _at(name, night)), ("Labels", "/labels", _at(name, night))]
        return Page("label", label or "No label", content, above)

    def why(self, given: Arguments) -> Page:
        """Why a document got a label, or why it did not: the words that speak for it and against it."""
        from xmc_ray.show.why import bars, marked, why  # torch takes seconds to import

        name, _, night = self._night(given)
        label = given.get("label", "").strip()
        row, texts = self._document(night, given.get("id", ""))
        text = texts.found.get(row["id"])
        content: dict[str, Any] = {"name": name, "night": night, "id": row["id"], "label": label, "note": texts.note}
        content |= {"stale": _is_stale(row, texts), "explanation": None, "tag": _score_of(row, label)}
        above = [*_above_night(name), (night.day, "/night", _at(name, night))]
        above.append((row["id"], "/document", _at(name, night) | {"id": row["id"]}))
        if text is not None:
            try:
                explanation = why(night.manifest, text.text, label)
            except (KeyError, TypeError):
                raise Missing("The manifest of the night does not say which bundle has made it.") from None
            content |= {"explanation": explanation, "bars": bars(explanation), "marked": marked(explanation)}
        return Page("why", label or "No label", content, above)

    def report(self, given: Arguments) -> bytes:
        """The report of a run or of a night, as it was written."""
        if "day" in given:
            _, _, night = self._night(given)
            return storage.read_bytes(join(night.folder, REPORT))
        return storage.read_bytes(join(self._named(given, "runs")[1], REPORT))

    def _look(self) -> Found:
        self._found = find(self.root)
        return self._found

    def _named(self, given: Arguments, kind: str) -> tuple[str, str]:
        """Name and address of a run or an output that was found: nothing else is ever opened."""
        name = given.get("at", "")
        for look in (False, True):  # folders that have come since are found, at the second attempt
            places = getattr(self._look() if look else self._found, kind)
            if name in places:
                return name, places[name]
        raise Missing(f"There is no such folder among the {kind} of {self.root}.")

    def _night(self, given: Arguments) -> tuple[str, str, Night]:
        name, output = self._named(given, "outputs")
        for folder in all_nights(output):
            if day_of(folder) == given.get("day"):
                return name, output, read_night(folder)
        raise Missing(f"There is no such night in {name}.")

    def _document(self, night: Night, id: str) -> tuple[dict[str, Any], Texts]:
        _whole(night)
        row = document(night.files, id)
        if row is None:
            raise Missing(f"The night {night.day} has no tags of such a document.")
        return row, look_up(night.manifest, [id], _ONE)

    def _precision(self, night: Night, output: str) -> Share | None:
        feedback = feedback_of(night.folder, output, self.root) if night.state == "finished" else None
        if feedback is None:
            return None
        try:
            return _live(night.files, feedback)
        except XmcError:  # a file of another kind
            return None


_COUNTS = ("in", "tagged", "reused", "rejected", "untagged", "documents_per_second")
_ABOVE = [("Overview", "/", dict[str, str]())]
_DRIFTS = (("training", "training"), ("the night before", "previous"))


@lru_cache(256)
def _live(files: tuple[FileInfo, ...], feedback: FileInfo) -> Share:
    return live_precision(files, feedback)


@lru_cache(16)
def _training_charts(journal: str, version: str) -> dict[str, Any]:
    return trends.alone(lambda: training_charts(Curves.read(storage.read_bytes(journal).splitlines())))


def _above_night(name: str) -> list[tuple[str, str, dict[str, str]]]:
    return [*_ABOVE, (name, "/nights", {"at": name})]


def _at(name: str, night: Night) -> dict[str, str]:
    return {"at": name, "day": night.day}


def _whole(night: Night) -> None:
    if night.state != "finished":
        raise Missing(night.note)


def _days(output: str) -> list[str]:
    return [day_of(folder) for folder in all_nights(output)]


def _text(uri: str) -> str | None:
    return storage.read_bytes(uri).decode(errors="replace") if storage.exists(uri) else None


def _last_figures(curves: Curves) -> list[tuple[str, float]]:
    names = sorted(name for name in curves.points if name.startswith("validation/"))
    return [(name.removeprefix("validation/"), curves.points[name][-1][1]) for name in names]


def _row(night: Night, precision: Mapping[str, float]) -> dict[str, Any]:
    figures = {name: count(night.manifest, name) for name in ("tagged", "reused", "rejected", "untagged")}
    return figures | {
        "psi": drift(night.manifest, "training"),
        "seconds": seconds(night.manifest),
        "live": precision.get(night.day),
    }


def _counts(values: object) -> list[tuple[str, int]]:
    counts = values.items() if isinstance(values, Mapping) else ()
    return [(str(name), n) for name, n in counts if isinstance(n, int)]


def _histogram(manifest: Mapping[str, Any], before: Night | None) -> Any:
    scores, then = manifest.get("scores"), before.manifest.get("scores") if before else None
    if not isinstance(scores, list) or not all(isinstance(n, int) for n in scores):
        return None
    same = isinstance(then, list) and len(then) == len(scores)
    return trends.alone(lambda: histogram(scores, then if same else None))


def _share(text: str | None) -> float:
    try:
        return min(1.0, max(0.0, float(text or 0)))
    except ValueError:
        return 0.0


def _position(text: str | None) -> Position:
    try:
        file, row = (max(0, int(part)) for part in (text or "0.0").split("."))
    except ValueError:
        return Position()
    return Position(file, row)


def _shown(row: Mapping[str, Any], texts: Texts, most: int = 0) -> dict[str, Any]:
    """A document with its text, or the beginning, and its tags as (label with its name, score)."""
    labels, scores = row["labels"] or [], row["scores"] or []
    names = row.get("names") or labels
    text = texts.found.get(row["id"])
    words = None if text is None else text.readable if most else excerpt(text.readable)
    tags = [(Label(label, name), score) for label, name, score in zip(labels, names, scores, strict=False)]
    return {"id": row["id"], "text": words and (words[:most] + "…" if most and len(words) > most else words), "tags": tags}


def _score_of(row: Mapping[str, Any], label: str) -> float | None:
    return dict(zip(row["labels"] or [], row["scores"] or [], strict=False)).get(label)


def _is_stale(row: Mapping[str, Any], texts: Texts) -> bool:
    """Whether the text is known not to be that which the night has read."""
    text = texts.found.get(row["id"])
    return text is not None and text.digest is not None and row.get("text_digest") not in (None, text.digest)


def _count(folder: str, label: str) -> Any:
    try:
        return count_of(folder, label)
    except XmcError:  # of a night that is damaged or in the making
        return None

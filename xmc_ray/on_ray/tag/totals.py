"""The totals of a night: counts, labels and their drift, and the report at the end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.labels import IntArray
from xmc_ray.errors import DataError, one_line
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.metrics.drift import Drift, DriftConfig, psi, worst
from xmc_ray.on_ray.tag.nights import COUNTS, MANIFEST, read_own
from xmc_ray.on_ray.tag.pieces import OUTCOMES, Summary
from xmc_ray.on_ray.tag.plan import Mask
from xmc_ray.reports.tagging import Night, tagging_report

_SHOWN_LABELS = 1000  # in the manifest, the most frequent ones; as many filters
_SAMPLES = 20  # in the report
_SHOWN_FILTERS = 10  # in a warning


@dataclass
class Totals:
    """Sums over the pieces of a night, in any order.

    ``labels`` has the labels that may be tagged: label, name, count. ``compared``: bool[L], those whose drift is measured, if
    not all: a hierarchy adds and drops broader labels, however the model's own tags are.
    """

    labels: pa.Table
    compared: Mask | None = None
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    scores: IntArray = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))
    samples: list[dict[str, Any]] = field(default_factory=list)
    of_filter: Counter[str] = field(default_factory=Counter)  # documents, by the filters that they name
    untagged_of_filter: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.label_counts: IntArray = np.zeros(len(self.labels), np.int64)
        self.label_scores = np.zeros(len(self.labels))

    def add(self, summary: Summary) -> None:
        """Add a piece that is done."""
        self.counts.update({name: summary[name] for name in OUTCOMES})
        self.reasons.update(summary["reasons"])
        for name, (documents, untagged) in summary.get("filters", {}).items():
            self.of_filter[name] += documents
            self.untagged_of_filter[name] += untagged
        self.scores += np.array(summary["scores"])
        labels, rows, sums = summary["labels"]
        self.label_counts[labels] += np.array(rows, np.int64)
        self.label_scores[labels] += sums
        # By a hash of their texts: the same samples whatever the order of the pieces, from all over the input.
        self.samples = sorted([*self.samples, *summary["samples"]], key=lambda sample: str(sample["digest"]))[:_SAMPLES]

    @property
    def documents(self) -> int:
        """Documents that are done, rejects included."""
        return sum(self.counts[name] for name in ("tagged", "reused", "rejected"))

    def manifest(self) -> dict[str, Any]:
        """These totals as entries of the manifest."""
        most = np.argsort(-self.label_counts, kind="stable")[:_SHOWN_LABELS]
        most = most[self.label_counts[most] > 0]
        shown = zip(self.labels["label"].take(pa.array(most)).to_pylist(), self.label_counts[most].tolist(), strict=True)
        return {
            "in": self.documents,
            **{name: self.counts[name] for name in OUTCOMES},
            "reasons": dict(self.reasons.most_common()),
            "labels": dict(shown),
            "distinct_labels": int((self.label_counts > 0).sum()),
            "scores": self.scores.tolist(),
            **({"untagged_by_filter": self._untagged_by_filter()} if self.of_filter else {}),
        }

    def _untagged_by_filter(self) -> dict[str, dict[str, int]]:
        """Filters that documents without a tag have named, those with most of them first."""
        most = sorted((+self.untagged_of_filter).items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_LABELS]
        return {name: {"documents": self.of_filter[name], "untagged": untagged} for name, untagged in most}

    def filters_in_vain(self) -> list[str]:
        """A warning of filters none of whose documents has got a tag, if there are any."""
        names = sorted(name for name, documents in self.of_filter.items() if documents == self.untagged_of_filter[name])
        if not names:
            return []
        shown = ", ".join(f"{one_line(name)} ({self.of_filter[name]:,})" for name in names[:_SHOWN_FILTERS])
        rest = f" and {len(names) - _SHOWN_FILTERS:,} more" if len(names) > _SHOWN_FILTERS else ""
        return [f"filters that leave all of their documents without a tag: {shown}{rest}"]

    def label_table(self) -> pa.Table:
        """All labels: ``label``, ``documents`` that got it, and the sum of its ``scores``."""
        return pa.table({"label": self.labels["label"], "documents": self.label_counts, "scores": self._score_sums})

    @property
    def _score_sums(self) -> npt.NDArray[np.float64]:
        """Rounded as the sums of pieces are, so that the order of pieces does not matter."""
        return np.asarray(self.label_scores.round(4))

    @property
    def expected_counts(self) -> IntArray:
        """Documents that have each label, if scores are probabilities; unlikely tags count little, so k matters little."""
        return np.rint(self._score_sums).astype(np.int64)

    def drift_from_night(self, folder: str) -> Drift | None:
        """Drift from another night; None if that has no counts, or none that can be read: it does not end this one."""
        uri = storage.join(folder, COUNTS)
        if not storage.exists(uri):
            return None
        try:
            before = storage.read_parquet(uri, ["label", "scores"])
        except DataError as error:
            print(f"warning: no drift from the night before: {error}", flush=True)
            return None
        ids = pc.index_in(before["label"], value_set=self.labels["label"].combine_chunks())
        known = pc.is_valid(ids).to_numpy()
        counts = np.zeros(len(self.labels), np.int64)
        counts[ids.drop_null().to_numpy()] = np.rint(before["scores"].to_numpy()[known]).astype(np.int64)
        return self._drift(counts)

    def _drift(self, counts: IntArray) -> Drift:
        """Drift from other counts of the labels."""
        return psi(*(each if self.compared is None else each * self.compared for each in (counts, self.expected_counts)))

    def close(
        self, title: str, manifest: dict[str, Any], previous: str | None, config: DriftConfig, known: Sequence[str] = ()
    ) -> tuple[str, list[str]]:
        """The report as a page, and warnings of drift; the page has those that are ``known`` besides.

        ``manifest`` gets the drift; DataError if it is more than the config allows.
        """
        training = self._drift(self.labels["count"].to_numpy().astype(np.int64))
        drifts = {"training": training, "previous": self.drift_from_night(previous) if previous else None}
        manifest["drift"] = {name: drift and drift.total for name, drift in drifts.items()}
        documents = self.counts["tagged"] + self.counts["reused"]
        if config.fail is not None and documents and not self.label_counts.any():
            raise DataError(
                "no document got a tag",
                found=f"{documents:,} documents without one",
                way_out="check the bundle and the language of the documents, or run again without drift.fail",
            )
        warnings = []
        for name, drift in drifts.items():
            verdict = config.verdict(drift.total) if drift else "unknown"
            if drift and verdict == "fail":
                labels = ", ".join(self.labels["label"][shift.label].as_py() for shift in worst(drift, 5))
                raise DataError(
                    f"the labels have moved too far from those of {name}",
                    found=f"PSI {drift.total:.3f}, most of it from {labels}",
                    expected=f"at most {config.fail}",
                    way_out="give another bundle, or run again with a higher drift.fail; finished pieces are kept",
                )
            if drift and verdict == "warn":
                warnings.append(f"the labels have moved from those of {name}: PSI {drift.total:.3f}, more than {config.warn}")
        before = read_own(storage.join(previous, MANIFEST), "scores") if previous else None
        night = Night(
            title=title,
            manifest=manifest,
            labels=self.labels,
            label_counts=self.label_counts,
            scores_before=before["scores"] if before else None,
            drift_previous=drifts["previous"],
            drift_training=drifts["training"],
            bounds=config,
            samples=self.samples,
            warnings=[*known, *warnings],
        )
        return tagging_report(night), warnings

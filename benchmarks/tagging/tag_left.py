"""The time left that a night announces, against what it then took: a night in which 3 % of the documents have changed.

First by a simulation of the same code on a clock of its own: 1 to 64 actors, whose models take the time of some pieces to load,
pieces that differ by a tenth in what they take, twelve of them an actor, which is the least. Then a real night on this
machine, whose actors are slowed down by small batches, so that what is measured is longer than what Ray needs to begin. It is
asked every half second around the middle, from 40 to 60 % of the documents. Bar: 25 % wrong, at the worst.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.compute as pc

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    documents_of,
    label_lists,
    make_bundle,
    options,
    own_ray,
    tag_config,
    tagger,
    told,
    write_documents,
)
from benchmarks.tagging.tag_changes import changed
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.progress import Pace

BAR, MIDDLE, ROWS, PIECES = 0.25, (0.4, 0.6), 500, 12
SLOW = 16  # tokens in a batch of the night that is watched: one document
CHARACTERS = 60  # of each document


class Clock:
    """A clock that is set."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def simulated(actors: int, loading: float, seed: int) -> float:
    """The worst error of a night."""
    rng, clock = np.random.default_rng(seed), Clock()
    ends = np.sort((loading + rng.uniform(0.9, 1.1, (actors, PIECES)).cumsum(1)).ravel())
    pace, errors = Pace(ROWS * len(ends), actors=actors, clock=clock), [0.0]
    first, last = (loading + (ends[-1] - loading) * share for share in MIDDLE)
    come = 0
    for now in np.linspace(first, last, 41):
        for clock.seconds in ends[come : np.searchsorted(ends, now, side="right")]:
            pace.add(ROWS)
            come += 1
        clock.seconds = now
        estimate = pace.estimate()
        errors.append(1.0 if estimate is None else abs(estimate[1] / (ends[-1] - now) - 1))
    return max(errors)


class Watched(Pace):
    """A pace that is asked every half second."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.asked: list[tuple[float, float, float]] = []  # time, share that is done, seconds left
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        while self.done < self.total:
            estimate = self.estimate()
            if estimate is not None:
                self.asked.append((time.monotonic(), self.done / self.total, estimate[1]))
            time.sleep(0.5)

    def add(self, documents: int) -> None:
        super().add(documents)
        self.ended = time.monotonic()

    def errors(self) -> Iterator[float]:
        """Of what was said around the middle."""
        for now, share, left in self.asked:
            if MIDDLE[0] <= share <= MIDDLE[1]:
                yield abs(left / (self.ended - now) - 1)


def real(arguments: Any) -> tuple[Watched, list[float]]:
    """A night that tags all documents, and one that tags 3 % of them."""
    documents = documents_of(arguments.data, arguments.documents)
    text = documents.column_names.index("text")
    documents = documents.set_column(text, "text", pc.utf8_slice_codeunits(documents["text"], 0, CHARACTERS))
    paces: list[Watched] = []

    def watched(*given: Any, **named: Any) -> Watched:
        paces.append(Watched(*given, **named))
        return paces[-1]

    with tempfile.TemporaryDirectory() as folder, own_ray():
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        source = write_documents(f"{folder}/documents", documents)
        first = job.tag(tag_config(source, bundle, f"{folder}/nights", date="2026-11-01", pool=arguments.pool))
        source = write_documents(f"{folder}/changed", changed(documents, 0))
        settings = {"previous": first, "date": "2026-11-02", "commit_rows": 20}
        pool = replace(arguments.pool, token_budget=SLOW)
        with patch.object(job, "Pace", watched):
            job.tag(tag_config(source, bundle, f"{folder}/nights", pool=pool, **settings))
    return paces[-1], list(paces[-1].errors())


def main() -> None:
    arguments = options(__doc__, documents=32_000)
    print(told(arguments))
    errors = []
    for actors in (1, 4, 16, 64):
        for loading in (1.0, 10.0):
            errors.append(max(simulated(actors, loading, seed) for seed in range(20)))
            print(
                f"simulated, {actors:2} actors, the model loads for {loading:4.0f} pieces' time: {errors[-1]:6.1%} at the worst"
            )
    pace, wrong = real(arguments)
    errors.append(max(wrong, default=1.0))
    print(f"real, {pace.total:,} documents to tag, asked {len(wrong)} times: {errors[-1]:6.1%} at the worst")
    verdict("tag-left", f"{max(errors):.1%}", f"{BAR:.0%}", max(errors) <= BAR)


if __name__ == "__main__":
    main()

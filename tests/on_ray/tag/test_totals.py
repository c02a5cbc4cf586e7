"""What a night adds up to."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import manifest_of, write
from pages import Page

from xmc_ray.errors import DataError
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.metrics.drift import DriftConfig
from xmc_ray.on_ray.tag.pieces import OUTCOMES
from xmc_ray.on_ray.tag.totals import Totals


def test_a_night_without_any_tag_does_not_pass_a_bound_of_the_drift() -> None:
    """There is no drift to measure then, yet scores that are all too low are no better than ones that have drifted."""
    totals = Totals(pa.table({"label": ["red"], "name": pa.nulls(1, pa.string()), "count": [1]}))
    totals.counts.update(tagged=300, untagged=300)
    with pytest.raises(DataError, match="no document got a tag; found 300 documents"):
        totals.close("dt=2026-11-23", {}, None, DriftConfig(fail=0.25))


def test_labels_that_have_moved_are_reported_or_fail_the_night(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = write(tmp_path / "in.parquet", [{"id": f"{n}", "text": "a red apple"} for n in range(1000)])
    with pytest.raises(DataError, match=r"moved too far from those of training; found PSI .*apple"):
        tag(catalogue, "--drift.fail=0.5")
    folder = tag(catalogue)
    assert "warning: the labels have moved from those of training: PSI" in capsys.readouterr().out
    assert manifest_of(folder)["drift"]["training"] > 0.5


def test_the_report_is_made_of_the_sums() -> None:
    totals = Totals(pa.table({"label": ["red", "green"], "name": ["Rosso", None], "count": [500, 500]}))
    histogram = [0] * SCORE_BINS
    histogram[-1] = 1000
    sample = {"digest": "d", "id": "a", "text": "a red apple", "labels": ["red"], "names": ["Rosso"], "scores": [0.97]}
    totals.add(
        {
            **dict.fromkeys(OUTCOMES, 0),
            "tagged": 1000,
            "rejected": 2,
            "reasons": {"text is empty": 2},
            "scores": histogram,
            "labels": ([0], [1000], [970.0]),
            "samples": [sample],
        }
    )
    times = {"started": "2026-11-23T02:00:00+00:00", "ended": "2026-11-23T02:00:09+00:00", "documents_per_second": 111.3}
    manifest = {**times, "bundle": "0123", "config": {"k": 5}, **totals.manifest()}
    page, warnings = totals.close("dt=2026-11-23", manifest, None, DriftConfig())
    texts = Page(page).texts
    assert {"1,002", "111.3", "Rosso", "a red apple", "0.97", "text is empty"} <= set(texts)
    assert "green" in texts and len(warnings) == 1, "its share has fallen to nothing"
    with pytest.raises(DataError, match=r"moved too far from those of training; found PSI .*, most of it from (red|green)"):
        totals.close("dt=2026-11-23", manifest, None, DriftConfig(fail=0.5))


def test_drift_is_not_that_of_labels_that_a_hierarchy_adds() -> None:
    """Training has counted no such label: of a model that tags as it was trained, a closed night is as steady as another."""
    labels = pa.table({"label": ["red", "blue", "colour"], "name": pa.nulls(3, pa.string()), "count": [500, 500, 0]})
    for compared, verdict in ((np.array([True, True, False]), "steady"), (None, "warn")):
        totals = Totals(labels, compared)
        totals.add(
            {
                **dict.fromkeys(OUTCOMES, 0),
                **{"tagged": 1000, "reasons": {}, "scores": [0] * SCORE_BINS, "samples": []},
                "labels": [[0, 1, 2], [500, 500, 1000], [450.0, 450.0, 900.0]],
            }
        )
        times = {"started": "2026-11-23T02:00:00+00:00", "ended": "2026-11-23T02:00:09+00:00", "documents_per_second": 111.3}
        manifest = {**times, "bundle": "0123", "config": {"k": 5}, **totals.manifest()}
        totals.close("dt=2026-11-23", manifest, None, DriftConfig())
        assert DriftConfig().verdict(manifest["drift"]["training"]) == verdict
        assert manifest["labels"] == {"colour": 1000, "red": 500, "blue": 500}


def test_totals_do_not_depend_on_the_order_of_pieces() -> None:
    labels = pa.table({"label": ["red"], "name": [None], "count": [1]})
    outcomes = dict.fromkeys(OUTCOMES, 0) | {"reasons": {}, "scores": [0] * SCORE_BINS, "samples": []}
    pieces = [outcomes | {"labels": [[0], [1], [score]]} for score in (0.1, 0.7, 0.5, 0.2)]
    forward, backward = Totals(labels), Totals(labels)
    for one, other in zip(pieces, pieces[::-1], strict=True):
        forward.add(one)
        backward.add(other)
    assert forward.label_scores[0] != backward.label_scores[0], "floats"
    assert forward.label_table() == backward.label_table()
    assert forward.expected_counts.tolist() == backward.expected_counts.tolist()


@pytest.mark.parametrize("damage", ["bytes", "columns"])
def test_counts_of_the_night_before_that_cannot_be_read_do_not_end_this_one(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "bytes":
        (tmp_path / "label-counts.parquet").write_bytes(b"half a file")
    else:
        pq.write_table(pa.table({"name": ["red"]}), tmp_path / "label-counts.parquet")
    totals = Totals(pa.table({"label": ["red"], "name": [None], "count": [1]}))
    assert totals.drift_from_night(str(tmp_path)) is None
    assert "warning: no drift from the night before: " in capsys.readouterr().out


def test_names_of_filters_cannot_command_the_terminal_or_pass_for_lines() -> None:
    totals = Totals(pa.table({"label": ["a"]}))
    totals.of_filter["\x1b[31mred\nfinished"] = totals.untagged_of_filter["\x1b[31mred\nfinished"] = 3
    (warning,) = totals.filters_in_vain()
    assert warning.endswith(": \N{REPLACEMENT CHARACTER}[31mred finished (3)")

"""Nights with filters: each document gets the best of its own labels, and a night's filters hold to its end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, manifest_of, read_night, write

from xmc_ray.classifier import XMCClassifier
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.model.predict import PredictConfig
from xmc_ray.on_ray.tag.pieces import PieceWriter

TENANTS = {"colours": COLOURS, "kinds": KINDS, "reds": ["red", "apple"]}


def row(number: int, tenant: str | None) -> dict[str, Any]:
    return {"id": f"d{number}", "text": f"a {COLOURS[number % 3]} {KINDS[number % 4]} number {number}", "tenant": tenant}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A column of tenants, each with labels of its own; and some that the bundle does not know."""
    pairs = [{"label": label, "tenant": tenant} for tenant, labels in TENANTS.items() for label in [*labels, "unheard of"]]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "table.parquet")
    return tmp_path / "table.parquet"


@pytest.fixture
def by_tenant(table: Path) -> list[str]:
    return ["--filters.column=tenant", "--filters.by=tenant", f"--filters.table={table}"]


def tags_of(folder: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_night(folder)[0].to_pylist()}


def every_label(classifier: XMCClassifier, texts: list[str]) -> list[list[tuple[str, float]]]:
    """All labels and their scores of each text, the best first, by exact scoring."""
    ensemble = classifier.ensemble
    tokens, n = ensemble.encode(pa.array(texts)), len(ensemble.labels)
    scores_Dk, ids_Dk = ensemble.predict(tokens, n, PredictConfig(), "exact")
    labels = np.array(ensemble.labels.labels.to_pylist())[ids_Dk]
    return [list(zip(*row, strict=True)) for row in zip(labels.tolist(), scores_Dk.tolist(), strict=True)]


@pytest.mark.parametrize("scoring", ["grouped", "exact"])
def test_each_tenant_gets_k_of_its_labels(
    scoring: str, tag: Callable[..., str], bundles: list[str], by_tenant: list[str], tmp_path: Path
) -> None:
    """Of a model with groups, a flat one with a linear ranker, and both: what exact scores of all labels give once filtered."""
    rows = [row(number, [*TENANTS][number % 3]) for number in range(30)]
    catalogue = write(tmp_path / "in.parquet", rows)
    for name, bundle in {"groups": bundles[0], "flat": bundles[1], "both": json.dumps(bundles)}.items():
        further = [*by_tenant, f"--model.scoring={scoring}"]
        folder = tag(catalogue, *further, bundle=bundle, output=tmp_path / name)
        found, manifest = tags_of(folder), manifest_of(folder)
        assert {key: entry["filter"] for key, entry in found.items()} == {entry["id"]: entry["tenant"] for entry in rows}
        classifier = XMCClassifier.load(bundles if name == "both" else bundle)
        for tenant, own in TENANTS.items():
            its = [entry for entry in rows if entry["tenant"] == tenant]
            texts = [entry["text"] for entry in its]
            # a linear ranker reorders the first labels alone, and those are others where some are left out
            is_filtered = scoring == "exact" and name != "flat"
            expected = every_label(classifier, texts) if is_filtered else classifier.predict(texts, k=3, allow=own)
            for entry, tags in zip(its, expected, strict=True):
                best = [(label, score) for label, score in tags if label in own][:3]
                assert found[entry["id"]]["labels"] == [label for label, _ in best] and len(best) == min(3, len(own))
                assert found[entry["id"]]["scores"] == pytest.approx([score for _, score in best], rel=1e-4)
        assert manifest["untagged"] == 0 and manifest["untagged_by_filter"] == {} and len(manifest["filters"]) == 32


def test_filters_hold_to_the_end_of_a_night_and_to_the_next(
    tag: Callable[..., str], by_tenant: list[str], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A night that is killed goes on with the same filters alone; one with others reuses nothing."""
    rows = [row(number, [*TENANTS][number % 3]) for number in range(40)]
    catalogue = write(tmp_path / "in.parquet", rows)
    written, write_piece = [], PieceWriter.__call__

    def killed_after_two(self: PieceWriter, number: int, piece: pa.Table) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write_piece(self, number, piece)

    kept = table.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(PieceWriter, "__call__", killed_after_two)
        with pytest.raises(KeyboardInterrupt):
            tag(catalogue, *by_tenant, commit_rows=10)
    pairs = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([*pairs, {"label": "fruit", "tenant": "reds"}]), table)
    with pytest.raises(ConfigError, match=r"holds another run: .*found filters = '\w{32}' instead of '\w{32}'"):
        tag(catalogue, *by_tenant, commit_rows=10)
    table.write_bytes(kept)
    with pytest.raises(ConfigError, match=r"found filters = .*, filters\.deny = \[\] instead of \['red'\]"):
        tag(catalogue, *by_tenant, '--filters.deny=["red"]', commit_rows=10)
    first = tag(catalogue, *by_tenant, commit_rows=10)
    whole = tag(catalogue, *by_tenant, output=tmp_path / "whole")
    assert len(tags_of(first)) == len(tags_of(whole)) == 40
    for key, document in tags_of(whole).items():  # other batches, and so another order of float32 sums
        assert tags_of(first)[key] == document | {"scores": pytest.approx(document["scores"], rel=1e-5)}
    assert tag(catalogue, *by_tenant, commit_rows=10) == first

    # the next day: one document has moved to another tenant, one has another text
    rows[3] |= {"tenant": "kinds"}
    rows[4] |= {"text": "a yellow plum"}
    write(catalogue, rows)
    second = tag(catalogue, *by_tenant, "--previous=last", date="2026-11-24")
    manifest, old, new = manifest_of(second), tags_of(first), tags_of(second)
    assert [manifest[name] for name in ("tagged", "reused")] == [2, 38]
    assert set(new["d3"]["labels"]) <= {*KINDS} and {*old["d3"]["labels"]} <= {*COLOURS}
    assert all(new[key] == old[key] for key in old if key not in ("d3", "d4"))

    # the day after: another tenant has one more label
    pq.write_table(pa.Table.from_pylist([*pairs, {"label": "fruit", "tenant": "reds"}]), table)
    third = tag(catalogue, *by_tenant, "--previous=last", date="2026-11-25")
    manifest = manifest_of(third)
    assert [manifest[name] for name in ("tagged", "reused")] == [40, 0]
    assert manifest["not_reused"].startswith("nothing is reused: the night before had another set of filters")
    assert tags_of(third)["d2"]["labels"][0] == "fruit" and "fruit" not in tags_of(first)["d2"]["labels"]
    fourth = tag(catalogue, "--previous=last", date="2026-11-26")
    assert manifest_of(fourth)["reused"] == 0 and "filter" not in read_night(fourth)[0].column_names


def test_documents_without_a_known_filter_are_rejects_unless_there_is_a_default(
    tag: Callable[..., str], by_tenant: list[str], tmp_path: Path
) -> None:
    tenants = ["colours", "nobody", None, "reds"]
    rows = [row(number, tenants[number % 4]) for number in range(20)]
    catalogue = write(tmp_path / "in.parquet", rows)
    with pytest.raises(DataError, match=r"50\.0%: filter is unknown \(5\), filter is null \(5\)"):
        tag(catalogue, *by_tenant)
    tags, rejects = read_night(tag(catalogue, *by_tenant, max_reject_share=0.5))
    assert len(tags) == 10
    reasons = {entry["id"]: (entry["reason"], entry["detail"]) for entry in rejects.to_pylist()}
    assert reasons["d1"] == ("filter is unknown", "nobody") and reasons["d2"] == ("filter is null", None) and len(reasons) == 10
    default = "--filters.default=kinds"
    tags, rejects = read_night(tag(catalogue, *by_tenant, default, max_reject_share=0.5, date="2026-11-24"))
    assert {entry["id"]: entry["labels"] for entry in tags.to_pylist()}["d2"][0] in KINDS
    assert len(tags) == 15 and set(rejects["reason"].to_pylist()) == {"filter is unknown"}
    with pytest.raises(DataError, match=r"no column 'client': .*set filters\.column to the right column"):
        tag(catalogue, *by_tenant, "--filters.column=client", date="2026-11-25")


def test_a_filter_of_the_run_and_named_ones(tag: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    """JSON lines, tenants that are integers, calibrated scores with thresholds, and filters in a file of settings."""
    lines = [json.dumps(row(number, None) | {"tenant": number % 2}) for number in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    settings = """
        [filters]
        column = "tenant"
        deny = ["fruit"]
        [filters.named.0]
        allow_prefixes = ["p"]
        [filters.named.1]
        deny_prefixes = ["p"]
    """
    (tmp_path / "filters.toml").write_text(settings)
    folder = tag(tmp_path / "in.jsonl", f"--config={tmp_path / 'filters.toml'}", k=7, min_precision=0.5)
    classifier = XMCClassifier.load(str(trained / "bundle"))
    for number, entry in enumerate(tags_of(folder).values()):
        assert entry["filter"] == str(number % 2) and "fruit" not in entry["labels"]
        assert all(label.startswith("p") is (number % 2 == 0) for label in entry["labels"])
        scores = dict(classifier.predict([row(number, None)["text"]], k=7, deny=["fruit"])[0])
        for label, score in zip(entry["labels"], entry["scores"], strict=True):
            assert label not in scores or score == pytest.approx(scores[label], rel=1e-4), "a filter does not change a score"
    alone = tag(tmp_path / "in.jsonl", '--filters.allow=["red", "plum"]', date="2026-11-24")
    tags = read_night(alone)[0]
    assert "filter" not in tags.column_names and "untagged_by_filter" not in manifest_of(alone)
    assert all(sorted(labels) == ["plum", "red"] for labels in tags["labels"].to_pylist())


def test_documents_that_a_filter_leaves_without_a_tag_are_told(
    tag: Callable[..., str], by_tenant: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the night before as well, whose tags are reused; in the log, the manifest and the report."""
    rows = [row(number, "kinds" if number % 2 else "reds") for number in range(12)]
    for entry in rows:
        entry["text"] = "a red number" if entry["tenant"] == "kinds" else "a red apple"
    catalogue = write(tmp_path / "in.parquet", rows)
    for day, reused in (("2026-11-23", 0), ("2026-11-24", 12)):
        capsys.readouterr()
        folder = tag(catalogue, *by_tenant, "--previous=last", date=day, min_score=0.6)
        manifest = manifest_of(folder)
        assert manifest["reused"] == reused and manifest["untagged"] == 6
        assert manifest["untagged_by_filter"] == {"kinds": {"documents": 6, "untagged": 6}}
        warning = "filters that leave all of their documents without a tag: kinds (6)"
        assert f"warning: {warning}" in capsys.readouterr().out
        page = Path(folder, "report.html").read_text()
        assert warning in page and "Without a tag, by filter" in page and "(of 6 documents)" in page


def test_bad_filters_end_before_anything_is_written(tag: Callable[..., str], by_tenant: list[str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [row(0, "reds")])
    for further, message in (
        (['--filters.deny=["rde"]'], r"filters\.deny has labels that no label of the bundle has; found 1 of 1, such as 'rde'"),
        (["--filters.allow=[]"], "a filter leaves no label at all"),
        (["--filters.column=tenant"], r"filters\.column needs filters with names"),
        ([*by_tenant, '--filters.deny=["red", "apple"]'], "a filter leaves no label at all; found filters 'reds'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tag(catalogue, *further)
    assert not (tmp_path / "out").exists()

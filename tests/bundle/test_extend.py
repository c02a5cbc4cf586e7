"""New labels are found, old ones are scored as before, deprecated ones are gone; ids, counts, names, bundles and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from fruit import COLOURS, KINDS
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import command
from xmc_ray.bundle import extend
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.extend import ExtendConfig, extend_bundle, joined
from xmc_ray.bundle.regression import RowsConfig
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.groups import GroupsConfig
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.metrics.at_k import propensities
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig

NEW = {"plum", "grape"}
LABELS = [["fruit", colour, kind] for colour in COLOURS for kind in KINDS] * 12
TEXTS = [f"a {colour} {kind}" for _, colour, kind in LABELS]
OLD = [[label for label in row if label not in NEW] for row in LABELS]
UNUSUAL = ["", "a blue text", "red"]


def fitted(encoder: Path, layers: int | None, max_size: int, candidates: int = 0) -> XMCClassifier:
    config = FitConfig(
        encoder=EncoderConfig(name=str(encoder), layers=layers, feature_layers=2, pooling="mean"),
        lexical=LexicalConfig(width=16, columns=512),
        linear=LinearConfig(candidates=candidates),
        groups=GroupsConfig(max_size=max_size),
        model=ModelConfig(shortlist=9, bottleneck=16, dropout=0.1, lift=1.0),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=8, batch_size=8),
    )
    return XMCClassifier.fit(TEXTS, OLD, config=config, names={"red": "Redness"}, device="cpu")


@pytest.fixture(scope="module", params=["words, flat", "words in groups", "both in groups", "with a linear ranker"])
def before(request: pytest.FixtureRequest, tiny_encoder: Path) -> XMCClassifier:
    """A classifier that has never seen two of the labels."""
    if request.param == "with a linear ranker":
        return fitted(tiny_encoder, 0, 3, candidates=20)
    layers, max_size = {"words, flat": (0, 1), "words in groups": (0, 3), "both in groups": (1, 3)}[request.param]
    return fitted(tiny_encoder, layers, max_size)


@pytest.fixture(scope="module")
def flat(tiny_encoder: Path) -> XMCClassifier:
    return fitted(tiny_encoder, 0, 1)


def scores(classifier: XMCClassifier, texts: list[str], n_labels: int) -> npt.NDArray[np.float32]:
    """float32[D, n_labels]: of the first labels, by exact scoring."""
    ensemble = classifier.ensemble
    found, ids = ensemble.predict(ensemble.encode(pa.array(texts)), len(ensemble.labels), classifier.prediction, "exact")
    by_id = np.zeros((len(texts), len(ensemble.labels) + 1), np.float32)
    np.put_along_axis(by_id, ids, found, 1)
    return by_id[:, :-1][:, :n_labels]  # the last column is that of no label


@pytest.mark.parametrize("join", [0.0, 0.5, 1.0])
def test_new_labels_are_found_and_old_ones_scored_as_before(before: XMCClassifier, join: float, tmp_path: Path) -> None:
    n_old, old_scores = len(before.bundle.labels), scores(before, [*TEXTS[:12], *UNUSUAL], 99)
    rows = RowsConfig(join=join)
    after = before.extend(TEXTS, LABELS, names={"plum": "A plum", "fruit": "Any fruit"}, rows=rows)
    assert after.evaluate(TEXTS, LABELS)["total"]["P@3"] > 0.9
    np.testing.assert_allclose(scores(after, [*TEXTS[:12], *UNUSUAL], n_old), old_scores[:, :n_old], rtol=1e-5, atol=1e-7)

    old, new = before.bundle, after.bundle
    assert new.labels.labels.to_pylist() == [*old.labels.labels.to_pylist(), "grape", "plum"]  # as often: by label
    assert new.labels.counts.tolist() == [*old.labels.counts.tolist(), 36, 36]
    names = dict(zip(new.labels.labels.to_pylist(), new.labels.names.to_pylist(), strict=True))
    assert (names["red"], names["plum"], names["fruit"], names["grape"]) == ("Redness", "A plum", "Any fruit", None)
    assert new.labels.n_documents == old.labels.n_documents == len(TEXTS)
    np.testing.assert_array_equal(new.groups.group_L[:n_old], old.groups.group_L)
    added = new.groups.group_L[n_old:] >= len(old.groups)
    if old.groups.flat or join == 1.0:
        assert new.groups.flat is old.groups.flat and added.all()
    elif join == 0.0:
        assert not added.any() and len(new.groups) == len(old.groups)

    fingerprint = after.save(str(tmp_path / "after"))
    assert fingerprint != before.save(str(tmp_path / "before"))
    assert new.labels.fingerprint != old.labels.fingerprint and len(before.bundle.labels) == n_old
    again = XMCClassifier.load(str(tmp_path / "after"), device="cpu")
    assert again.predict(TEXTS[:12], k=9) == after.predict(TEXTS[:12], k=9)
    assert again.bundle.metrics["extension"]["labels from documents"] == 2


def test_more_documents_than_were_trained_on_leave_old_scores_alone(before: XMCClassifier) -> None:
    """Though with more documents the propensity of a label with as many of them is another one."""
    after = before.extend([*TEXTS, *TEXTS, *TEXTS], [*LABELS, *LABELS, *LABELS])
    assert after.bundle.labels.n_documents == 3 * len(TEXTS)
    n_labels = len(before.bundle.labels)
    np.testing.assert_allclose(scores(after, UNUSUAL, n_labels), scores(before, UNUSUAL, n_labels), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("join", [0.0, 1.0])
def test_new_groups_are_lifted_by_their_labels_and_old_ones_as_before(before: XMCClassifier, join: float) -> None:
    after = before.extend(TEXTS, LABELS, rows=RowsConfig(join=join)).bundle
    old, new, n_old = before.bundle.model.recall.lift, after.model.recall.lift, len(before.bundle.groups)
    assert old is not None and new is not None and bool((old > 0).all())
    torch.testing.assert_close(new[:n_old], old, rtol=0, atol=0)  # even of a group that a new label has joined
    counts = after.labels.counts
    told = propensities(counts, after.labels.n_documents).tolist()
    expected = reference.lifts(after.groups.group_L.tolist(), counts.tolist(), told, 1.0)
    assert new[n_old:].tolist() == pytest.approx(expected[n_old:], rel=1e-5)
    assert len(new) > n_old or (join == 0.0 and not after.groups.flat)


def test_documents_of_the_new_labels_alone_are_enough(before: XMCClassifier) -> None:
    """The old labels of these documents are not told; those that have the one new label are negatives for the other."""
    texts, labels = zip(
        *((text, [*NEW & set(row)]) for text, row in zip(TEXTS, LABELS, strict=True) if NEW & set(row)), strict=True
    )
    after = before.extend(texts, labels, rows=RowsConfig(penalty=0.1))  # words that meant little to the old labels
    for text, row in zip(TEXTS[:12], LABELS[:12], strict=True):
        score = dict(after.predict([text], k=99)[0])
        assert not NEW & set(row) or {max(NEW, key=score.__getitem__)} == NEW & set(row)


def test_a_calibrated_bundle_stays_calibrated(flat: XMCClassifier, tmp_path: Path) -> None:
    calibrated = XMCClassifier(replace(flat.bundle), flat.prediction).calibrate(TEXTS, OLD)
    calibrated.extend(TEXTS, LABELS, deprecate=["red"]).save(str(tmp_path / "after"))  # with thresholds, one a label
    after = XMCClassifier.load(str(tmp_path / "after"))
    n_old = len(flat.bundle.labels)
    expected = scores(calibrated, UNUSUAL, n_old)
    kept = np.array(flat.bundle.labels.labels.to_pylist()) != "red"
    np.testing.assert_allclose(scores(after, UNUSUAL, n_old)[:, kept], expected[:, kept], rtol=1e-5)
    calibration = after.bundle.calibration
    assert calibration is not None and len(calibration.thresholds(0.5)) == n_old + len(NEW)
    found = after.explain("a green plum", "plum")
    assert found.chance == pytest.approx(dict(after.predict(["a green plum"], k=99)[0])["plum"], rel=1e-5)
    assert f"as a tag {found.chance:.4f}" in str(found)
    assert calibration.arithmetic == "cpu float32" and not found.notes
    other = replace(after.bundle, calibration=replace(calibration, arithmetic="cuda bfloat16"))
    note = "note: scores are computed by cpu float32 and were calibrated by cuda bfloat16: "
    assert note in str(XMCClassifier(other).explain("a green plum", "plum"))
    assert flat.explain("a green pear", "pear").chance is None
    hidden = after.explain("a red plum", "red")
    assert (hidden.score, hidden.chance) == (0, 0) and "score 0.0000, as a tag 0.0000" in str(hidden)


def test_figures_are_those_of_the_bundle_before(flat: XMCClassifier, tmp_path: Path) -> None:
    measured = {"P@1": 0.75, "calibration": {"ECE@5": 0.125}}
    first = XMCClassifier(replace(flat.bundle, metrics=measured)).extend(TEXTS, LABELS)
    first.save(str(tmp_path / "first"))
    second = XMCClassifier.load(str(tmp_path / "first")).extend(names={"berry": "A berry"}, deprecate=["pear"])
    second.save(str(tmp_path / "second"))
    assert list(first.bundle.metrics) == list(second.bundle.metrics) == ["extension"]
    assert first.bundle.metrics["extension"]["before"] == measured
    assert second.bundle.metrics["extension"]["before"] == first.bundle.metrics
    cards = [(tmp_path / name / "README.md").read_text() for name in ("first", "second")]
    added = "- before the extension (2 labels from documents, 0 deprecated, 0 labels from names alone):\n"
    assert f"\n{added}    - P@1: 0.75\n" in cards[0]
    again = "- before the extension (0 labels from documents, 1 deprecated, 1 labels from names alone):\n"
    assert f"\n{again}    {added}        - P@1: 0.75\n" in cards[1]

    judged = XMCClassifier(replace(flat.bundle, metrics=measured | {"feedback": "0123"})).extend(TEXTS, LABELS)
    judged.save(str(tmp_path / "judged"))
    assert json.loads((tmp_path / "judged/config.json").read_text())["feedback"] == "0123", "it is what it was trained with"
    unmeasured = flat.extend(TEXTS, LABELS)
    unmeasured.save(str(tmp_path / "unmeasured"))
    assert "before the extension" not in (tmp_path / "unmeasured" / "README.md").read_text()


def test_a_label_without_any_negative(flat: XMCClassifier) -> None:
    after = flat.extend(["a blue plum"] * 4, [["blue"]] * 4)
    (blue,) = map(dict, after.predict(["a blue plum"], k=9))
    assert blue["blue"] > 0.5


def test_names_alone_make_labels(before: XMCClassifier) -> None:
    names = {"reddish": "a red apple", "green": "known already"}
    after = before.extend(names=names)
    assert after.bundle.labels.labels.to_pylist() == [*before.bundle.labels.labels.to_pylist(), "reddish"]
    assert after.bundle.labels.counts[-1] == 0 and after.bundle.metrics["extension"]["labels from names alone"] == 1
    red, green = scores(after, ["a red apple", "a green pear"], 99)[:, -1]
    assert 0 < green < red <= 1  # rounded
    if not before.bundle.groups.flat:
        packed = before.extend(names={f"{number}": f"a {number}" for number in range(40)})  # more than groups have places
        assert len(packed.bundle.groups) > len(before.bundle.groups)
        assert np.isfinite(scores(packed, UNUSUAL, 99)).all()


def test_deprecated_labels_keep_their_ids_and_are_never_predicted(before: XMCClassifier, tmp_path: Path) -> None:
    after = before.extend(deprecate=["red", "pear"])
    labels = before.bundle.labels.labels.to_pylist()
    gone = [labels.index(label) for label in ("red", "pear")]
    assert after.bundle.labels.labels.to_pylist() == labels
    assert after.bundle.labels.fingerprint == before.bundle.labels.fingerprint
    expected = scores(before, [*TEXTS, *UNUSUAL], len(labels))
    expected[:, gone] = 0
    np.testing.assert_allclose(scores(after, [*TEXTS, *UNUSUAL], len(labels)), expected, rtol=1e-5)
    assert not {"red", "pear"} & {label for row in after.predict(TEXTS, k=99) for label, _ in row}
    assert after.ensemble.predict(after.ensemble.encode(pa.array(TEXTS)), len(labels), after.prediction)[1][:, -2:].max() == -1
    assert after.save(str(tmp_path / "after")) != before.save(str(tmp_path / "before"))

    found = after.explain("a red pear", "red")
    assert found.score == 0 and found.words == () and "deprecated" in str(found)
    both = after.extend(TEXTS, LABELS, deprecate=["fruit"])  # what was gone stays gone
    assert {label for row in both.predict(TEXTS, k=99) for label, _ in row} == {*COLOURS, *KINDS} - {"red", "pear"}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 0.4, 2.0]))
def test_no_group_gets_more_labels_than_it_has_places(seed: int, n_new: int, n_groups: int, least: float) -> None:
    rng = np.random.default_rng(seed)
    recall, free = rng.random((n_new, n_groups), np.float32), rng.integers(0, 3, n_groups)
    left = free.copy()
    for label, group in enumerate(joined(recall, free, least)):
        open_groups = [recall[label, other] for other in range(n_groups) if left[other] > 0]
        if group < 0:
            assert max(open_groups, default=-1.0) < least
        else:
            assert left[group] > 0 and recall[label, group] == max(open_groups) >= least
            left[group] -= 1


def test_groups_are_found_for_a_few_labels_at_a_time(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: memory that grows with new labels times groups. Blocks change no group; a block has a bounded number of cells."""
    before, cells = fitted(tiny_encoder, 0, 3), list[int]()
    names = {"berry": "A yellow berry", "lime": "A green lime", "sloe": "A blue plum"}
    whole = before.extend(TEXTS, LABELS, names=names, rows=RowsConfig(join=0.0)).bundle.groups

    def counted(recall_NG: np.ndarray, *further: Any) -> Any:
        cells.append(recall_NG.size)
        assert recall_NG.dtype == np.float32
        return joined(recall_NG, *further)

    monkeypatch.setattr(extend, "joined", counted)
    for most, blocks in ((10**6, 1), (2 * len(before.bundle.groups), 3), (1, 5)):
        monkeypatch.setattr(extend, "_CELLS", most)
        parts = before.extend(TEXTS, LABELS, names=names, rows=RowsConfig(join=0.0)).bundle.groups
        np.testing.assert_array_equal(parts.group_L, whole.group_L)
        assert len(cells) == blocks and max(cells) <= max(most, len(before.bundle.groups))
        cells.clear()


def test_bfloat16_tables_grow_too(tiny_encoder: Path) -> None:
    classifier = fitted(tiny_encoder, 0, 3)
    table = classifier.bundle.model.table
    assert table is not None
    table.weight.data = table.weight.data.bfloat16()
    classifier.bundle.model.config = replace(classifier.bundle.model.config, table="bfloat16")
    after = classifier.extend(TEXTS, LABELS)
    assert after.bundle.model.table is not None and after.bundle.model.table.weight.dtype == torch.bfloat16
    assert after.evaluate(TEXTS, LABELS)["total"]["P@3"] > 0.9


def test_input_that_does_not_fit(flat: XMCClassifier) -> None:
    with pytest.raises(ConfigError, match=r"found gren; perhaps one of: green"):
        flat.extend(deprecate=["gren"])
    with pytest.raises(DataError, match="nothing to add; found 3 documents, no new label"):
        flat.extend(TEXTS[:3], OLD[:3])
    with pytest.raises(DataError, match="nothing to add"):
        flat.extend(TEXTS[:2], [[], []])
    with pytest.raises(DataError, match="differ in length"):
        flat.extend(TEXTS[:2], [["a"]])
    with pytest.raises(ConfigError, match="an ensemble is not one bundle"):
        XMCClassifier(Ensemble([flat.bundle, flat.bundle])).extend(TEXTS, LABELS)


def extend_job(options: dict[str, object]) -> str:
    return extend_bundle(command.parse(ExtendConfig, [f"--{name}={value}" for name, value in options.items()]))


def test_the_job(flat: XMCClassifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat.save(str(tmp_path / "old"))
    rows = [{"id": f"{n}", "text": text, "labels": row} for n, (text, row) in enumerate(zip(TEXTS, LABELS, strict=True))]
    rows += [{"id": "without text", "text": None, "labels": ["never seen"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    pq.write_table(pa.table({"label": ["plum", "berry"], "name": ["Plum", "Berry"]}), tmp_path / "labels.parquet")
    options = {
        "bundle": tmp_path / "old",
        "documents.uri": tmp_path / "new.parquet",
        "label_names": tmp_path / "labels.parquet",
        "output": tmp_path / "new",
        "deprecate": '["pear"]',
        "max_reject_share": 0.02,
    }
    with pytest.raises(DataError, match=r"too many documents are rejected: .*text is null \(1\); expected at most 0\.1%"):
        extend_job(options | {"max_reject_share": 0.001})
    capsys.readouterr()
    fingerprint = extend_job(options)
    said = capsys.readouterr()
    assert said.err.endswith(f"rejected 1 of {len(rows)} documents: text is null (1)\n")
    assert said.out == (
        "2 labels from documents, 1 deprecated, 1 labels from names alone, of 9 labels in all\n"
        f"bundle {fingerprint}: {tmp_path / 'new'}\n"
    )
    after = XMCClassifier.load(str(tmp_path / "new"), device="cpu")
    assert after.bundle.fingerprint == fingerprint and after.bundle.metrics["extension"]["of"] == flat.bundle.fingerprint
    assert after.bundle.labels.labels.to_pylist()[-3:] == ["grape", "plum", "berry"]
    assert {"plum", "red", "fruit"} < {label for label, _ in after.predict(["a red plum"], k=4)[0]}  # and perhaps the berry
    with pytest.raises(ConfigError, match="not empty"):
        extend_job(options)
    with pytest.raises(DataError, match="no column 'tags'"):
        extend_job(options | {"documents.labels": "tags", "output": tmp_path / "other"})
    with pytest.raises(DataError, match=r"no such file.*nowhere"):
        extend_job(options | {"label_names": tmp_path / "nowhere.parquet", "output": tmp_path / "other"})
    pq.write_table(pa.table({"name": ["Plum"]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="label names need one column"):
        extend_job(options | {"output": tmp_path / "other"})
    assert not (tmp_path / "other").exists()

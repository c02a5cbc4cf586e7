"""Averaged scores against sums in dictionaries; several bundles as one classifier."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.bundle.content import Bundle, load_bundle, save_bundle
from xmc_ray.bundle.ensemble import Ensemble, Listed, average, n_listed
from xmc_ray.bundle.members import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics.calibration import Calibration
from xmc_ray.model.encoder import EncoderConfig, build_encoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.tokenizer import Tokenizer

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
TEXTS = ["a red apple", "the green pear and a plum", "grape " * 30, "", "a yellow plum " * 9]
N_LABELS = 12
COUNTS = np.ones(N_LABELS, np.int64)


@st.composite
def lists(draw: Any) -> tuple[list[Listed], list[np.ndarray], int]:
    """What several models list for some documents: scores with ties, some zero, fewer than there is room for or none.

    Also the raw scores, in the same order, which differ where the scores do not; and k.
    """
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    k, n_rows = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    width = k + draw(st.integers(0, 4))
    listed = []
    for _ in range(draw(st.integers(1, 4))):
        scores, labels = np.zeros((n_rows, width), np.float32), np.full((n_rows, width), -1, np.int64)
        for row in range(n_rows):
            size = rng.integers(0, width + 1)
            scores[row, :size] = -np.sort(-rng.integers(0, 9, size) / 8)
            labels[row, :size] = rng.choice(15, size, replace=False)
        listed.append((scores, labels))
    raw = [-np.sort(-rng.integers(0, 33, part.shape) / 32).astype(np.float32) * (labels >= 0) for part, labels in listed]
    return listed, raw, k


def in_words(values: list[np.ndarray], listed: list[Listed]) -> list[list[dict[int, float]]]:
    rows = [zip(part, labels, strict=True) for part, (_, labels) in zip(values, listed, strict=True)]
    return [[{label: score for label, score in zip(*row[::-1], strict=True) if label >= 0} for row in part] for part in rows]


@QUICK
@given(lists())
def test_mean_equals_the_slow_twin(problem: tuple[list[Listed], list[np.ndarray], int]) -> None:
    """Kind: calibration makes scores equal and loses their order. Raw scores break the ties of a mean."""
    listed, raw, k = problem
    scores, labels = average(listed, k, raw)
    assert scores.shape == labels.shape == (len(listed[0][0]), k)
    assert (scores.dtype, labels.dtype) == (np.float32, np.int64)
    for row, expected in enumerate(
        reference.mean_scores(in_words([part for part, _ in listed], listed), k, in_words(raw, listed))
    ):
        padded = expected + [(-1, 0.0)] * (k - len(expected))
        assert labels[row].tolist() == [label for label, _ in padded]
        np.testing.assert_allclose(scores[row], [score for _, score in padded], rtol=1e-6)


@QUICK
@given(lists(), st.randoms(use_true_random=False))
def test_the_order_of_the_models_does_not_matter(problem: tuple[list[Listed], list[np.ndarray], int], random: Any) -> None:
    """Kind: an order that is an accident, here that in which bundles are given; to the last digit, ties included."""
    listed, raw, k = problem
    rng = np.random.default_rng(0)
    listed = [((scores * rng.random()).astype(np.float32), labels) for scores, labels in listed]  # sums that are rounded
    turned = random.sample(range(len(listed)), len(listed))
    one, other = average(listed, k, raw), average([listed[n] for n in turned], k, [raw[n] for n in turned])
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@QUICK
@given(lists())
def test_one_list_is_left_as_it_is(problem: tuple[list[Listed], list[np.ndarray], int]) -> None:
    """Also where its scores are equal; given several times, equal scores are in the order of ids, as for other models."""
    (scores, labels), k = problem[0][0], problem[2]
    alone, thrice = average([(scores, labels)], k), average([(scores, labels)] * 3, k)
    np.testing.assert_array_equal(alone[0], scores[:, :k])
    np.testing.assert_array_equal(alone[1], labels[:, :k])
    by_id = np.lexsort((labels, -scores, labels < 0), axis=1)[:, :k]
    np.testing.assert_array_equal(thrice[0], np.take_along_axis(scores, by_id, 1))
    np.testing.assert_array_equal(thrice[1], np.take_along_axis(labels, by_id, 1))


@pytest.mark.parametrize(
    ("k", "n_labels", "expected"),
    [(1, 10**6, 100), (10, 10**6, 100), (20, 10**6, 200), (500, 10**6, 1000), (2000, 10**6, 2000), (5, 40, 40), (50, 40, 50)],
)
def test_how_many_labels_are_listed(k: int, n_labels: int, expected: int) -> None:
    assert n_listed(k, n_labels) == expected


def make_bundle(encoder: Path, n_groups: int, max_tokens: int = 24, n_labels: int = N_LABELS) -> Bundle:
    torch.manual_seed(n_groups)
    labels = LabelIndex.count([pa.array([[f"label {n}" for n in range(row + 1)] for row in range(n_labels)])])
    groups = LabelGroups(np.arange(n_labels) % n_groups)
    tokenizer = Tokenizer.load(encoder, max_tokens)
    module = build_encoder(EncoderConfig(name=str(encoder), feature_layers=2, pooling="mean"), tokenizer)
    model = LightXML(module, groups, ModelConfig(shortlist=n_groups, bottleneck=16)).eval()
    return Bundle(model, tokenizer, labels, groups, metrics={})


@pytest.fixture(scope="module")
def places(tiny_encoder: Path, other_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Bundles of other groups (grouped, flat), other lengths, and another encoder with another tokenizer."""
    folder = tmp_path_factory.mktemp("bundles")
    bundles = {
        "grouped": make_bundle(tiny_encoder, 3),
        "flat": make_bundle(tiny_encoder, N_LABELS),
        "short": make_bundle(tiny_encoder, 4, max_tokens=8),
        "other": make_bundle(other_encoder, 2),
    }
    for name, bundle in bundles.items():
        save_bundle(bundle, str(folder / name))
    return [str(folder / name) for name in bundles]


def scored(uris: str | list[str], k: int) -> list[dict[str, float]]:
    return [dict(tags) for tags in XMCClassifier.load(uris, device="cpu").predict(TEXTS, k)]


def test_an_ensemble_averages_its_classifiers(places: list[str]) -> None:
    ids = {label: number for number, label in enumerate(load_bundle(places[0]).labels.labels.to_pylist())}
    listed = [[{ids[label]: score for label, score in row.items()} for row in scored(place, N_LABELS)] for place in places]
    for row, expected in zip(scored(places, 5), reference.mean_scores(listed, 5), strict=True):
        assert [ids[label] for label in row] == [label for label, _ in expected]
        np.testing.assert_allclose(list(row.values()), [score for _, score in expected], rtol=1e-5)


def test_members_are_calibrated_before_the_mean(places: list[str]) -> None:
    texts = pa.array(TEXTS)
    one, two = (Ensemble.load(place) for place in places[:2])
    raw = [part.predict(part.encode(texts), N_LABELS, PredictConfig()) for part in (one, two)]
    for part, (scores, labels), wish in zip((one, two), raw, (0.3, 0.7), strict=True):
        hits = np.random.default_rng(0).random(scores.shape) < wish
        part.bundles[0].calibration = Calibration.of(scores, labels, hits, part.labels.counts)
    both, own = Ensemble([*one.bundles, *two.bundles]), [scores for scores, _ in raw]
    maps = [part.bundles[0].calibration for part in (one, two)]
    expected = average(
        [(known.calibrated(*listed), listed[1]) for known, listed in zip(maps, raw, strict=True) if known], 4, own
    )
    np.testing.assert_array_equal(both.predict(both.encode(texts), 4, PredictConfig())[0], expected[0])
    one.bundles[0].calibration = None  # one without: the scores are the models' own again
    np.testing.assert_array_equal(both.predict(both.encode(texts), 4, PredictConfig())[0], average(raw, 4)[0])


def test_neither_order_nor_repetition_matters(places: list[str]) -> None:
    for row, other in zip(scored(places, 4), scored(places[::-1], 4), strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    for row, same in zip(scored(places[0], 4), scored([places[0], places[0]], 4), strict=True):
        assert list(row.items()) == list(same.items())
    assert scored(places[0], 4) == scored(places[:1], 4)


def test_the_first_tags_do_not_depend_on_k(places: list[str]) -> None:
    for few, many in zip(scored(places, 2), scored(places, 10), strict=True):
        assert list(few.items()) == list(many.items())[:2]


def test_one_bundle_predicts_as_its_model(places: list[str]) -> None:
    bundle, ensemble, texts = load_bundle(places[0]), Ensemble.load(places[0]), pa.array(TEXTS)
    expected = predict(bundle.model, bundle.tokenizer.encode(texts)[0], 3, PredictConfig())
    for one, other in zip(ensemble.predict(ensemble.encode(texts), 3, PredictConfig()), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("calibrated_by", "warning"),
    [
        (["cpu float32", "cpu float32"], None),
        (["cpu float32", "cuda bfloat16"], "computed by cpu float32 and were calibrated by cuda bfloat16: "),
        ([None, "cpu float32"], "computed by cpu float32 and were calibrated by an arithmetic that the bundle does not name: "),
        (["cuda bfloat16", "none"], None),  # no score is calibrated then
    ],
)
def test_scores_calibrated_by_another_arithmetic(
    calibrated_by: list[str | None], warning: str | None, places: list[str], tmp_path: Path
) -> None:
    """Kind: calibration is fitted by one arithmetic and applied to scores of another, without a word."""
    for number, by in enumerate(calibrated_by):
        bundle = load_bundle(places[number])
        if by != "none":
            bundle.calibration = Calibration.of(np.ones((9, 1)), np.zeros((9, 1), int), np.ones((9, 1), bool), COUNTS, by)
        save_bundle(bundle, str(tmp_path / str(number)))
    members = Members.read([str(tmp_path / "0"), str(tmp_path / "1")])
    said = members.calibration_warning(["cpu float32", "cpu float32"])
    assert said is None if warning is None else said is not None and warning in said


def test_scores_that_are_not_finite_are_an_error(places: list[str]) -> None:
    """Thresholds would leave out every label of such a model, without a word."""
    for place in places[:2]:
        bundle = load_bundle(place)
        bundle.model.recall.weight.data[0] = torch.nan
        ensemble = Ensemble([bundle])
        with pytest.raises(ModelError, match=rf"bundle {bundle.fingerprint}: scores are not finite; found \d of 3 documents"):
            ensemble.predict(ensemble.encode(pa.array(TEXTS[:3])), 3, PredictConfig())


def test_a_bundle_that_is_overwritten_in_use_gives_no_scores(places: list[str], tmp_path: Path) -> None:
    """Kind: check, then use. Weights are mapped from their file: who writes into it changes those of a running model."""
    shutil.copytree(places[0], tmp_path / "bundle")
    ensemble, weights = Ensemble.load(tmp_path / "bundle"), tmp_path / "bundle" / "model.safetensors"
    tokens = ensemble.encode(pa.array(TEXTS))
    before = ensemble.predict(tokens, 3, PredictConfig())
    shutil.copyfile(weights, tmp_path / "other")
    (tmp_path / "other").rename(weights)  # the file that is mapped stays as it was
    np.testing.assert_array_equal(ensemble.predict(tokens, 3, PredictConfig())[0], before[0])
    ensemble = Ensemble.load(tmp_path / "bundle")
    with open(weights, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(ModelError, match=r"the bundle has been overwritten while it was in use: .*model\.safetensors"):
        ensemble.predict(tokens, 3, PredictConfig())
    with pytest.raises(ModelError, match="overwritten while it was in use"):
        save_bundle(ensemble.bundles[0], str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_a_bundle_that_was_replaced_since_it_was_read_is_not_opened(places: list[str], tmp_path: Path) -> None:
    shutil.copytree(places[0], tmp_path / "bundle")
    members = Members.read(tmp_path / "bundle")
    assert Ensemble.load(members).bundles[0].fingerprint == members.fingerprint
    shutil.rmtree(tmp_path / "bundle")
    shutil.copytree(places[1], tmp_path / "bundle")
    for use in (lambda: Ensemble.load(members), members.fetch):
        with pytest.raises(ModelError, match=f"has been replaced by another: .*expected {members.fingerprint}"):
            use()


def test_scoring_by_measurement(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, config = Ensemble.load(places[:1]), PredictConfig()
    tokens, asked = ensemble.encode(pa.array(TEXTS)), []

    def takes(seconds: dict[str, float]) -> str:
        clock = [0.0]

        def slow(*args: Any) -> Any:
            scoring = args[4]
            asked.append(scoring)
            clock[0] += seconds[scoring] * (100 if len(asked) % 8 in (1, 2) else 1)  # the warm-up does not count
            return predict(*args)

        monkeypatch.setattr("xmc_ray.bundle.ensemble.predict", slow)
        monkeypatch.setattr("xmc_ray.bundle.ensemble.time.perf_counter", lambda: clock[0])
        return ensemble.fastest_scoring(tokens, 3, config)

    assert takes({"grouped": 1.0, "exact": 1.09}) == "exact"
    assert takes({"grouped": 1.0, "exact": 1.11}) == "grouped"
    assert takes({"grouped": 9.0, "exact": 1.0}) == "exact"
    assert asked == ["grouped", "exact"] * 12
    assert Ensemble.load(places[1]).fastest_scoring(tokens, 3, config) == "exact", "flat models score every label"


def test_exact_scoring_of_an_ensemble(places: list[str]) -> None:
    ensemble, config = Ensemble.load(places), PredictConfig()
    tokens = ensemble.encode(pa.array(TEXTS))
    for bundle in ensemble.bundles:
        bundle.model.shortlist = 1
    few, exact = (ensemble.predict(tokens, 5, config, scoring) for scoring in ("grouped", "exact"))
    for bundle in ensemble.bundles:
        bundle.model.shortlist = bundle.model.recall.n_groups
    every = ensemble.predict(tokens, 5, config)
    np.testing.assert_allclose(exact[0], every[0], rtol=1e-5)
    np.testing.assert_array_equal(exact[1], every[1])
    assert (few[0] <= every[0] + 1e-6).all() and (few[0] < every[0] - 1e-3).any()


def test_metrics_of_an_ensemble(places: list[str]) -> None:
    classifier = XMCClassifier.load(places, device="cpu")
    first = [[tags[0][0]] for tags in classifier.predict(TEXTS, k=1)]
    assert classifier.evaluate(TEXTS, first)["total"]["P@1"] == 1.0


def test_a_text_is_encoded_once_by_each_distinct_tokenizer(places: list[str]) -> None:
    ensemble = Ensemble.load(places)
    lengths = [[len(row) for row in tokens.to_pylist()] for tokens in ensemble.encode(pa.array(TEXTS))]
    assert [max(row) for row in lengths] == [24, 8, 24]  # grouped and flat read the same tokens
    labels, tokenizers = Members.read(places).fetch()
    assert labels["label"].to_pylist() == ensemble.labels.labels.to_pylist()
    assert [tokenizer.max_tokens for tokenizer in tokenizers] == [24, 8, 24]


def test_fingerprints(places: list[str]) -> None:
    one, two, turned = (Members.read(uris).fingerprint for uris in (places[0], places[:2], places[1::-1]))
    assert one == Members.read([Path(places[0])]).fingerprint == load_bundle(places[0]).fingerprint
    assert len({one, two, turned}) == 3
    assert len(two) == 16 and int(two, 16) > 0


def test_other_labels_are_refused(places: list[str], tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tiny_encoder, 3, n_labels=7)
    save_bundle(bundle, str(tmp_path / "other"))
    with pytest.raises(ModelError, match="different labels") as caught:
        Members.read([places[0], str(tmp_path / "other")])
    for told in (places[0], str(tmp_path / "other"), bundle.labels.fingerprint, load_bundle(places[0]).labels.fingerprint):
        assert told in str(caught.value)
    with pytest.raises(ModelError, match=r"different labels: bundle 2"):
        Ensemble([make_bundle(tiny_encoder, 3), make_bundle(tiny_encoder, 3, n_labels=7)])


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="no bundle is given"):
        XMCClassifier.load([])
    with pytest.raises(ConfigError, match="no bundle is given"):
        Ensemble([])


def test_an_ensemble_is_not_saved_as_one_bundle(places: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save each bundle"):
        XMCClassifier.load(places, device="cpu").save(str(tmp_path / "all"))
    assert not (tmp_path / "all").exists()

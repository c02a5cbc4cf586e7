"""The classifier in one process, on a problem with a simple rule."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, fit_config, problem

from xmc_ray import (
    Callback,
    ConfigError,
    DataError,
    EncoderConfig,
    FitConfig,
    HierarchyConfig,
    LexicalConfig,
    LoopConfig,
    ModelError,
    XMCClassifier,
)
from xmc_ray.training.loop import Step


@pytest.mark.parametrize("max_size", [1, 3])
def test_fit_predict_evaluate_save_load(tiny_encoder: Path, tmp_path: Path, max_size: int) -> None:
    steps: list[Step] = []
    texts, labels = problem(160, seed=0)
    names = {"red": "Red", "fruit": "Fruit"}
    classifier = XMCClassifier.fit(texts, labels, config=fit_config(tiny_encoder, max_size), names=names, on_step=steps.append)
    assert len(steps) == 12 * 20
    assert classifier.bundle.groups.flat is (max_size == 1)

    new_texts, new_labels = problem(40, seed=1)
    for tags, true in zip(classifier.predict(new_texts, k=3), new_labels, strict=True):
        assert {label for label, _ in tags} == set(true)
        assert [score for _, score in tags] == sorted((score for _, score in tags), reverse=True)
    result = classifier.evaluate(new_texts, new_labels)
    assert result["total"]["P@3"] == 1.0
    assert result["documents"] == 40

    classifier.save(str(tmp_path / "bundle"))
    again = XMCClassifier.load(str(tmp_path / "bundle"))
    assert again.predict(new_texts[:5], k=4) == classifier.predict(new_texts[:5], k=4)
    assert dict(zip(again.bundle.labels.labels.to_pylist(), again.bundle.labels.names.to_pylist(), strict=True))["red"] == "Red"


@pytest.mark.parametrize("max_size", [1, 3])
def test_a_frozen_encoder_in_micro_batches(tiny_encoder: Path, max_size: int) -> None:
    plain, losses = fit_config(tiny_encoder, max_size), []
    frozen = replace(plain, encoder=replace(plain.encoder, freeze=2), loop=replace(plain.loop, epochs=4, accumulate=3))
    XMCClassifier.fit(*problem(64, seed=0), config=frozen, on_step=lambda step: losses.append(step.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_fewer_candidates_than_k_give_fewer_tags(tiny_encoder: Path) -> None:
    texts, labels = problem(32, seed=0)
    classifier = XMCClassifier.fit(texts, labels, config=fit_config(tiny_encoder, 3))
    (tags,) = classifier.predict(["a red plum"], k=50)
    assert len(tags) == len({label for label, _ in tags}) <= 8
    with pytest.raises(ConfigError, match="invalid value of k"):
        classifier.predict(["a red plum"], k=0)
    assert classifier.predict([], k=3) == []


def test_documents_without_labels_are_left_out_and_empty_texts_get_tags(tiny_encoder: Path) -> None:
    texts, labels = problem(32, seed=0)
    classifier = XMCClassifier.fit([*texts, "nothing known"], [*labels, []], config=fit_config(tiny_encoder, 3))
    assert classifier.bundle.labels.n_documents == 33
    assert len(classifier.predict([""], k=2)[0]) == 2


def test_errors(tiny_encoder: Path) -> None:
    with pytest.raises(DataError, match="differ in length"):
        XMCClassifier.fit(["one"], [], config=fit_config(tiny_encoder, 3))
    with pytest.raises(DataError, match="no document has a label"):
        XMCClassifier.fit(["one"], [[]], config=fit_config(tiny_encoder, 3))
    with pytest.raises(DataError, match="no document has a label"):
        XMCClassifier.fit([], [], config=fit_config(tiny_encoder, 3))
    few = replace(fit_config(tiny_encoder, 3), loop=LoopConfig(accumulate=3))
    with pytest.raises(ConfigError, match="cannot share a batch; found 3 parts, batches of 2 documents"):
        XMCClassifier.fit(["one", "two"], [["a"], ["b"]], config=few)


# --- arguments (kind of fault: the Python interface does not check them; sample letters-for-labels)


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path) -> XMCClassifier:
    brief = replace(fit_config(tiny_encoder, 3), loop=LoopConfig(epochs=1, batch_size=8))
    return XMCClassifier.fit(*problem(32, seed=0), config=brief, device="cpu")


def test_integers_are_labels_as_in_files(tiny_encoder: Path) -> None:
    brief = replace(fit_config(tiny_encoder, 3), loop=LoopConfig(epochs=1, batch_size=8))
    fitted = XMCClassifier.fit(
        ["a red apple", "a pear"] * 8, np.array([[1, 1], None] * 8, object), config=brief, names={1: "One"}
    )
    assert fitted.bundle.labels.labels.to_pylist() == ["1"] and fitted.bundle.labels.names.to_pylist() == ["One"]


@pytest.mark.parametrize("method", ["fit", "evaluate", "calibrate", "extend", "explain"])
def test_labels_as_letters_are_refused_everywhere(method: str, classifier: XMCClassifier, tiny_encoder: Path) -> None:
    texts, labels = ["a red apple"] * 2, ["fruit"] * 2
    calls = {
        "fit": lambda: XMCClassifier.fit(texts, labels, config=fit_config(tiny_encoder, 3)),
        "evaluate": lambda: classifier.evaluate(texts, labels),
        "calibrate": lambda: classifier.calibrate(texts, labels),
        "extend": lambda: classifier.extend(texts, labels),
        "explain": lambda: classifier.explain("a red apple", "red", (texts, labels)),
    }
    with pytest.raises(
        DataError, match=r"labels of a document are no list: labels\[0\]; found str 'fruit'.*write it as a list"
    ):
        calls[method]()


@pytest.mark.parametrize("k", [0, -1, True, 1.5, None, "3"])
def test_k_that_is_no_positive_integer(k: object, classifier: XMCClassifier) -> None:
    with pytest.raises(ConfigError, match=r"invalid value of k; found .*; expected an integer, at least 1"):
        classifier.predict(["a red plum"], k=k)  # type: ignore[arg-type]


def test_k_is_bounded_by_the_labels(classifier: XMCClassifier) -> None:
    """Kind of fault: memory goes by a setting instead of by the data."""
    assert classifier.predict(["a red plum"], k=10**12) == classifier.predict(["a red plum"], k=np.int64(8))


def test_labels_are_chosen_among_allowed_ones(classifier: XMCClassifier) -> None:
    texts = ["a red apple", "a green plum"]
    every = classifier.predict(texts, k=100)
    for given, kept in (
        ({"allow": [*KINDS, " red "]}, {*KINDS, "red"}),
        ({"deny": ["fruit", "red"]}, {*COLOURS, *KINDS} - {"red"}),
        ({"allow": COLOURS, "deny": ["red"]}, {*COLOURS} - {"red"}),
    ):
        for all_tags, tags in zip(every, classifier.predict(texts, k=100, **given), strict=True):
            assert {label for label, _ in tags} <= kept
            scores = dict(all_tags)
            assert all(score == pytest.approx(scores.get(label, score), rel=1e-5) for label, score in tags)
    assert classifier.predict(texts, k=1, allow=["pear"])[0][0][0] == "pear"
    with pytest.raises(ConfigError, match=r"filters\.allow has labels .*; found 1 of 1, such as .rde."):
        classifier.predict(texts, allow=["rde"])
    with pytest.raises(ConfigError, match="a filter leaves no label at all"):
        classifier.predict(texts, allow=[])
    with pytest.raises(DataError, match="deny are no list"):
        classifier.predict(texts, deny="red")


def test_a_model_of_words_can_be_pickled_after_labels_were_chosen(tiny_encoder: Path) -> None:
    """The hooks of a transformer cannot."""
    settings = fit_config(tiny_encoder, 3)
    words = replace(settings, encoder=replace(settings.encoder, layers=0), lexical=LexicalConfig(width=16, columns=4096))
    classifier = XMCClassifier.fit(*problem(32, seed=0), config=replace(words, loop=LoopConfig(epochs=1)), device="cpu")
    before = classifier.predict(["a red apple"], k=2, deny=["apple"])
    assert pickle.loads(pickle.dumps(classifier)).predict(["a red apple"], k=2, deny=["apple"]) == before


def test_a_hierarchy_is_of_the_classifier_s_labels(classifier: XMCClassifier, tiny_encoder: Path, tmp_path: Path) -> None:
    table = tmp_path / "h.parquet"
    pq.write_table(pa.table({"label": [*COLOURS, *KINDS], "parent": ["colour"] * 3 + ["fruit"] * 4}), table)
    closing = HierarchyConfig(table=str(table), close=True)
    hierarchy, texts = classifier.hierarchy(closing), ["a red plum", "", "a green pear"]
    for plain, tags in zip(classifier.predict(texts, k=3), classifier.predict(texts, k=3, hierarchy=hierarchy), strict=True):
        expected = dict(plain)
        for above, below in (("colour", COLOURS), ("fruit", KINDS)):
            scores = [score for label, score in plain if label == above or label in below]
            expected |= {above: max(scores)} if scores else {}
        assert dict(tags) == expected and [score for _, score in tags] == sorted(expected.values(), reverse=True)
    few = XMCClassifier.fit(
        ["a plum"] * 8, [["plum"]] * 8, config=replace(fit_config(tiny_encoder, 1), loop=LoopConfig(epochs=1))
    )
    with pytest.raises(ConfigError, match="the hierarchy is of other labels; take that of this classifier's"):
        few.predict(["a plum"], hierarchy=hierarchy)
    with pytest.raises(ConfigError, match="invalid hierarchy; found HierarchyConfig; expected TagHierarchy"):
        few.predict(["a plum"], hierarchy=closing)  # type: ignore[arg-type]


def test_arguments_that_cannot_be_meant(classifier: XMCClassifier, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"texts are no list; found str 'a red plum'.*write \[texts\]"):
        classifier.predict("a red plum")
    for labels in ([[]], [["unheard of"]]):
        for call in (classifier.evaluate, classifier.calibrate):
            with pytest.raises(DataError, match="no document has a label that the model knows; found 1 documents"):
                call(["a"], labels)
    with pytest.raises(DataError, match="no document has a label that the model knows"):
        classifier.evaluate([], [])
    with pytest.raises(DataError, match="deprecate are no list"):
        classifier.extend(deprecate="red")
    with pytest.raises(DataError, match="not a string: text"):
        classifier.explain(None, "red")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid config; found dict; expected FitConfig"):
        XMCClassifier.fit(["a"], [["b"]], config={"loop": 1})  # type: ignore[arg-type]
    for device in ("gpu", "meta", "hpu"):
        with pytest.raises(ConfigError, match=f"no such device; found '{device}'"):
            XMCClassifier.fit(["a"], [["b"]], config=fit_config(tiny_encoder, 3), device=device)
    for documents in (["a"], 5, (["a"], [["b"]], [])):
        with pytest.raises(DataError, match=r"documents are no pair; found \w+; expected \(texts, labels\)"):
            classifier.explain("a red plum", "red", documents)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid rows; found int; expected RowsConfig"):
        classifier.extend(["a"], [["b"]], rows=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid bundle; found str; expected Bundle or Ensemble"):
        XMCClassifier("bundle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid prediction; found int; expected PredictConfig"):
        XMCClassifier(classifier.bundle, 5)  # type: ignore[arg-type]
    for uri in (None, 7, ["a", None]):
        with pytest.raises(ConfigError, match="not an address"):
            XMCClassifier.load(uri)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not an address"):
        classifier.save(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such device"):
        XMCClassifier.load(tmp_path, device="gpu")
    with pytest.raises(ConfigError, match=r"no such device; found 'cuda:0'"):
        XMCClassifier.load(tmp_path, device=0)
    for callbacks in (None, Callback()):
        with pytest.raises(ConfigError, match=r"callbacks are no list; found \w+; expected a list of callbacks"):
            XMCClassifier.fit(["a"], [["b"]], config=fit_config(tiny_encoder, 3), callbacks=callbacks)  # type: ignore[arg-type]
    for name, value in {"loop": {"epochs": 3}, "linear": None}.items():
        with pytest.raises(ConfigError, match=f"invalid value of FitConfig.{name}; found .*; expected L"):
            FitConfig(**{name: value})
    with pytest.raises(ConfigError, match=r"invalid value of EncoderConfig.random; found 'no'; expected True or False"):
        EncoderConfig(random="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"invalid value of LoopConfig.epochs; found '3'; expected an integer, at least 1"):
        LoopConfig(epochs="3")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not a finished bundle"):
        XMCClassifier.load(tmp_path / "nowhere")
    classifier.save(tmp_path / "bundle")
    assert XMCClassifier.load([tmp_path / "bundle"], device="cpu").predict(iter(["a red plum"]), k=1)
    with pytest.raises(ConfigError, match="not empty"):
        classifier.save(tmp_path / "bundle")

"""The whole method in one process, on a problem with a simple rule."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xmc_ray import (
    ConfigError,
    DataError,
    EncoderConfig,
    FitConfig,
    GroupsConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    XMCClassifier,
)
from xmc_ray.training.loop import Step

COLOURS, KINDS = ["red", "green", "yellow"], ["apple", "pear", "plum", "grape"]


def problem(n_rows: int, seed: int) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(seed)
    pairs = [(str(rng.choice(COLOURS)), str(rng.choice(KINDS))) for _ in range(n_rows)]
    return [f"a {colour} {kind}" for colour, kind in pairs], [["fruit", colour, kind] for colour, kind in pairs]


def config(tiny_encoder: Path, max_size: int) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), feature_layers=3, pooling="mean"),
        groups=GroupsConfig(max_size=max_size),
        model=ModelConfig(shortlist=3, bottleneck=16, dropout=0.1),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=12, batch_size=8),
    )


@pytest.mark.parametrize("max_size", [1, 3])
def test_fit_predict_evaluate_save_load(tiny_encoder: Path, tmp_path: Path, max_size: int) -> None:
    steps: list[Step] = []
    texts, labels = problem(160, seed=0)
    names = {"red": "Red", "fruit": "Fruit"}
    classifier = XMCClassifier.fit(texts, labels, config=config(tiny_encoder, max_size), names=names, on_step=steps.append)
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
    plain, losses = config(tiny_encoder, max_size), []
    frozen = replace(plain, encoder=replace(plain.encoder, freeze=2), loop=replace(plain.loop, epochs=4, accumulate=3))
    XMCClassifier.fit(*problem(64, seed=0), config=frozen, on_step=lambda step: losses.append(step.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_fewer_candidates_than_k_give_fewer_tags(tiny_encoder: Path) -> None:
    texts, labels = problem(32, seed=0)
    classifier = XMCClassifier.fit(texts, labels, config=config(tiny_encoder, 3))
    (tags,) = classifier.predict(["a red plum"], k=50)
    assert len(tags) == len({label for label, _ in tags}) <= 8
    with pytest.raises(ConfigError, match="invalid value of k"):
        classifier.predict(["a red plum"], k=0)
    assert classifier.predict([], k=3) == []


def test_documents_without_labels_are_left_out_and_empty_texts_get_tags(tiny_encoder: Path) -> None:
    texts, labels = problem(32, seed=0)
    classifier = XMCClassifier.fit([*texts, "nothing known"], [*labels, []], config=config(tiny_encoder, 3))
    assert classifier.bundle.labels.n_documents == 33
    assert len(classifier.predict([""], k=2)[0]) == 2


def test_errors(tiny_encoder: Path) -> None:
    with pytest.raises(DataError, match="differ in length"):
        XMCClassifier.fit(["one"], [], config=config(tiny_encoder, 3))
    with pytest.raises(DataError, match="no document has a label"):
        XMCClassifier.fit(["one"], [[]], config=config(tiny_encoder, 3))
    with pytest.raises(DataError, match="no document has a label"):
        XMCClassifier.fit([], [], config=config(tiny_encoder, 3))
    few = replace(config(tiny_encoder, 3), loop=LoopConfig(accumulate=3))
    with pytest.raises(ConfigError, match="cannot share a batch; found 3 parts, batches of 2 documents"):
        XMCClassifier.fit(["one", "two"], [["a"], ["b"]], config=few)

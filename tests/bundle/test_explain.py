"""Contributions of words against texts scored without them one by one; the path of a label; neighbours."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from fruit import COLOURS, KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmc_ray import command
from xmc_ray.bundle import explain, explanation
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explain import ExplainConfig
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.groups import GroupsConfig
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig

LABELS = [["fruit", colour, kind] for colour in COLOURS for kind in KINDS] * 12
TEXTS = [f"a {colour} {kind}" for _, colour, kind in LABELS]
WORDS = st.lists(st.sampled_from(["a", "red", "Red,", "green", "apple", "apple.", "(plum)", "xyz", "..."]), max_size=7)


def fitted(encoder: Path, layers: int | None, width: int, max_size: int, candidates: int = 0) -> XMCClassifier:
    config = FitConfig(
        encoder=EncoderConfig(name=str(encoder), layers=layers, feature_layers=2, pooling="mean"),
        text=TextConfig(max_tokens=24),
        lexical=LexicalConfig(width=width, columns=512),
        linear=LinearConfig(candidates=candidates),
        groups=GroupsConfig(max_size=max_size),
        model=ModelConfig(shortlist=2, bottleneck=16, dropout=0.1, lift=1.0),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=8, batch_size=8),
    )
    names = {"red": "Redness", "fruit": "Fruit"}
    return XMCClassifier.fit(TEXTS, LABELS, config=config, names=names, device="cpu")


@pytest.fixture(scope="module")
def classifiers(tiny_encoder: Path) -> dict[str, XMCClassifier]:
    """What reads: a transformer, words and pairs, or both; with groups and without, with a linear ranker and without."""
    return {
        "transformer in groups": fitted(tiny_encoder, 1, 0, 3),
        "words, flat": fitted(tiny_encoder, 0, 16, 1),
        "both in groups": fitted(tiny_encoder, 1, 16, 3),
        "words, flat, with a linear ranker": fitted(tiny_encoder, 0, 16, 1, 20),
        "words in groups, with a linear ranker": fitted(tiny_encoder, 0, 16, 3, 20),
    }


@pytest.fixture(scope="module")
def ensemble(classifiers: dict[str, XMCClassifier]) -> XMCClassifier:
    return XMCClassifier(Ensemble([classifiers["transformer in groups"].bundle, classifiers["words, flat"].bundle]))


KINDS_OF_MODEL = [
    "transformer in groups",
    "words, flat",
    "both in groups",
    "words, flat, with a linear ranker",
    "words in groups, with a linear ranker",
]


def scorer(classifier: XMCClassifier, label: str) -> Callable[[str], float]:
    """Texts to the label's score among all labels."""
    k = len(classifier.ensemble.labels)

    def score(text: str) -> float:
        ensemble = classifier.ensemble
        scores, ids = ensemble.predict(ensemble.encode(pa.array([text])), k, classifier.prediction, "exact")
        return float(scores[0][ids[0] == ensemble.labels.find(label)][0])

    return score


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS, label=st.sampled_from(["fruit", "red", "plum"]))
def test_contributions_equal_the_slow_twin(
    kind: str, words: list[str], label: str, classifiers: dict[str, XMCClassifier]
) -> None:
    found = classifiers[kind].explain(" ".join(words), label)
    expected = reference.contributions(words, explanation._PUNCTUATION, scorer(classifiers[kind], label))
    assert [word.word.casefold() for word in found.words] == list(expected)
    for word in found.words:
        times, worth = expected[word.word.casefold()]
        assert word.times == times
        assert word.contribution == pytest.approx(worth, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_the_word_that_carries_a_label_is_the_first(kind: str, classifiers: dict[str, XMCClassifier]) -> None:
    found = classifiers[kind].explain("a green plum", "plum")
    assert found.score > 0.5
    assert max(found.words, key=lambda word: word.contribution or 0.0).word == "plum"
    lost = 2**-23 / (1 - found.score)  # a score is float32: near 1 it has few digits of its distance to 1
    assert found.log_odds == pytest.approx(math.log(found.score / (1 - found.score)), abs=1e-3 + lost)
    assert found.without_words < found.log_odds
    assert re.search(r"\+\d+\.\d\d █{24} plum", str(found)) and "[+plum]" in str(found)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_the_path_agrees_with_predictions(kind: str, classifiers: dict[str, XMCClassifier]) -> None:
    classifier = classifiers[kind]
    tags = classifier.predict(["a red apple"], k=10)[0]
    groups = classifier.bundle.groups
    for place, (label, score) in enumerate(tags, 1):
        (path,) = classifier.explain("a red apple", label).paths
        assert path.score == pytest.approx(score, abs=1e-5)
        assert (path.rank == place) or len(tags) < 8  # grouped scoring lists those of shortlisted groups alone
        assert path.group_rank <= path.shortlist
        if not groups.flat:
            assert path.rank_score is not None
            assert path.recall * path.rank_score * path.linear == pytest.approx(score, abs=1e-5)
            members = groups.label_GM[path.group]
            assert len(path.others) == (members >= 0).sum() - 1
            assert [other for _, other in path.others] == sorted((other for _, other in path.others), reverse=True)


@pytest.mark.parametrize("max_size", [1, 3])
def test_labels_that_the_linear_ranker_does_not_look_at_have_the_scores_of_predictions(
    max_size: int, tiny_encoder: Path
) -> None:
    classifier = fitted(tiny_encoder, 0, 16, max_size, candidates=2)
    behind = 0
    for label, score in classifier.predict(["a red apple"], k=8)[0]:
        found = classifier.explain("a red apple", label)
        assert found.score == pytest.approx(score, abs=1e-6)
        behind += "the linear ranker reorders the first 2 labels, and this is none of them" in found.notes
    assert behind == len(classifier.predict(["a red apple"], k=8)[0]) - 2


def test_a_group_that_is_not_shortlisted_is_said_so(classifiers: dict[str, XMCClassifier]) -> None:
    classifier = classifiers["transformer in groups"]
    found = [classifier.explain("a red apple", label) for label in (*COLOURS, *KINDS, "fruit")]
    missed = [one for one in found if one.paths[0].group_rank > one.paths[0].shortlist]
    assert missed
    for one in missed:
        assert any("does not shortlist" in note for note in one.notes)
        assert one.label not in {label for label, _ in classifier.predict(["a red apple"], k=50)[0]}


def test_an_ensemble_is_explained_by_means(ensemble: XMCClassifier, classifiers: dict[str, XMCClassifier]) -> None:
    found = ensemble.explain("a red apple", "red")
    parts = [classifiers[kind].explain("a red apple", "red") for kind in KINDS_OF_MODEL[:2]]
    assert found.score == pytest.approx(np.mean([part.score for part in parts]))
    assert found.paths == tuple(part.paths[0] for part in parts)
    for place, word in enumerate(found.words):
        assert word.contribution == pytest.approx(np.mean([part.words[place].contribution for part in parts]))
    assert found.name == "Redness" and str(found).startswith("red (Redness): score 0.")


def test_a_text_that_is_cut_off(classifiers: dict[str, XMCClassifier]) -> None:
    """Leaving a word out brings none in that had been cut off."""
    short, long = (classifiers["both in groups"].explain(f"{'a ' * 21}red{end}", "red") for end in ("", " apple plum"))
    assert [word.contribution is None for word in long.words] == [False, False, True, True]
    assert long.words[:2] == short.words
    assert long.notes[0] == "2 words were cut off or have no token: the model has not read them"


def test_words_that_are_not_read_cost_nothing(
    tiny_encoder: Path, classifiers: dict[str, XMCClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of two models, one that reads less far says 0 of the words that only the other reads."""
    n_variants, features = list[int](), explain.features

    def counted(model: LightXML, tokens: pa.ListArray, config: PredictConfig) -> torch.Tensor:
        n_variants.append(len(tokens))
        return features(model, tokens, config)

    monkeypatch.setattr(explain, "features", counted)
    long = classifiers["both in groups"]
    short = XMCClassifier(replace(long.bundle, tokenizer=Tokenizer.load(tiny_encoder, 6)), long.prediction)
    text = f"a red plum and a green apple {' '.join(map(str, range(5000)))}"
    alone, less, both = (
        one.explain(text, "red").words for one in (long, short, XMCClassifier(Ensemble([long.bundle, short.bundle])))
    )
    assert len(both) == 5006 and max(n_variants) <= 24 + 2
    assert [word.word for word in less if word.contribution is not None] == ["a", "red", "plum", "and"]
    for word, one, other in zip(both, alone, less, strict=True):
        mean = None if one.contribution is None else (one.contribution + (other.contribution or 0)) / 2
        assert word.contribution == (mean if mean is None else pytest.approx(mean, abs=1e-6))


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_text_without_words(text: str, ensemble: XMCClassifier) -> None:
    found = ensemble.explain(text, "plum")
    assert found.words == () and found.log_odds == pytest.approx(found.without_words)
    assert "the text has no words" in found.notes and "note: the text has no words" in str(found)


def test_neighbours_are_the_nearest_by_cosine_over_all_chunks(
    ensemble: XMCClassifier, classifiers: dict[str, XMCClassifier]
) -> None:
    found = ensemble.explain("a red apple", "red", (TEXTS, LABELS)).neighbours
    assert len(found) == 3 and {near.text for near in found} == {"a red apple"}
    assert found[0].similarity == pytest.approx(1.0, abs=1e-5)
    for kind in KINDS_OF_MODEL:
        bundle = classifiers[kind].bundle
        chunks = [(pa.array([text]), pa.array([labels])) for text, labels in zip(TEXTS[:12], LABELS[:12], strict=True)]
        near = explain.explain(Ensemble([bundle]), "a red", "red", PredictConfig(), [*chunks, *empty()], nearest=4).neighbours
        features = explain.features(bundle.model, bundle.tokenizer.encode(pa.array(["a red", *TEXTS[:12]]))[0], PredictConfig())
        cosines = reference.cosines(features.tolist())
        expected = sorted(
            ((text, cosine) for text, cosine in zip(TEXTS, cosines, strict=False) if "red" in text), key=lambda p: -p[1]
        )
        assert [one.text for one in near] == [text for text, _ in expected[:4]]
        assert [one.similarity for one in near] == pytest.approx([cosine for _, cosine in expected[:4]], abs=1e-5)


def empty() -> list[tuple[pa.Array, pa.ListArray]]:
    return [
        (pa.array([], pa.string()), pa.array([], pa.list_(pa.string()))),
        (pa.array(["x"]), pa.array([None], pa.list_(pa.string()))),
    ]


def test_a_label_that_is_not_known(ensemble: XMCClassifier) -> None:
    with pytest.raises(ConfigError, match=r"does not know this label; found aple; perhaps one of: apple"):
        ensemble.explain("a red apple", "aple")
    with pytest.raises(ConfigError, match=r"found 1234; no label is spelt like it"):
        ensemble.explain("a red apple", "1234")


def test_the_job(classifiers: dict[str, XMCClassifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifiers["both in groups"].save(str(tmp_path / "bundle"))
    rows = [{"id": f"{n}", "text": text, "labels": labels} for n, (text, labels) in enumerate(zip(TEXTS, LABELS, strict=True))]
    rows += [{"id": "without text", "text": None, "labels": ["red"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    options = {
        "bundle": tmp_path / "bundle",
        "text": "a red apple",
        "label": "red",
        "documents.uri": tmp_path / "train.parquet",
    }
    found = explain_job(options)
    assert found == XMCClassifier.load(str(tmp_path / "bundle"), device="cpu").explain("a red apple", "red", (TEXTS, LABELS))
    assert capsys.readouterr().out == f"{found}\n"
    assert "   1.000 a red apple" in str(found)
    with pytest.raises(DataError, match="no column 'tags'"):
        explain_job(options | {"documents.labels": "tags"})
    with pytest.raises(ConfigError, match="invalid value of nearest"):
        explain_job(options | {"nearest": 0})


def explain_job(options: dict[str, object]) -> explanation.Explanation:
    return explain.print_explanation(command.parse(ExplainConfig, [f"--{name}={value}" for name, value in options.items()]))

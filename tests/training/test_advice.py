"""What is said of a model that is worse than it could be: each sentence where it belongs, and not where it does not."""

from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.inputs import minilm
from xmc_ray.data.labels import LabelIndex
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training.advice import LateLoss, cut_off, everywhere, foreign, rise, unsettled

KNOWN = {
    "plain": "The committee agreed that the new building should be opened before the end of the year.",
    "a package": "This library provides functions to read and write compressed archives; it contains the development files.",
    "a work of art": "Sketch of a ruined castle beside a river, with a boat. Joseph Turner. Graphite on paper, 1802",
}
FOREIGN = {
    "German": "Die Straßenbahnhaltestelle liegt gegenüber dem Krankenhaus und wird täglich von vielen Fahrgästen benutzt.",
    "Polish": "Komitet uzgodnił, że nowy budynek powinien zostać otwarty przed końcem roku.",
    "Russian": "Комитет решил, что новое здание должно быть открыто до конца года.",
    "Chinese": "委员会同意新建筑应在年底前开放，尽管预算尚未获得批准。",
    "Japanese": "委員会は、予算がまだ承認されていないにもかかわらず、新しい建物を年末までに開館すべきであると合意した。",
    "Korean": "위원회는 예산이 아직 승인되지 않았지만 새 건물을 연말 전에 개관하기로 합의했다.",
    "no language": "xqzv kjwp zzrt qqlm vbnx pwtr hgfd zxcv mnbq lkjh wqrt",
}


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return Tokenizer.load(minilm(), 64)


def encoded(tokenizer: Tokenizer, *texts: str) -> pa.ListArray:
    return tokenizer.encode(pa.array(texts, pa.string()))[0]


def test_documents_in_a_language_that_the_encoder_does_not_know(english: Tokenizer) -> None:
    known, strange = (encoded(english, *texts.values()) for texts in (KNOWN, FOREIGN))
    assert english.foreign(known) == 0 and english.foreign(strange) == 1
    assert foreign(english, known, "mine") is None
    said = foreign(english, strange, "mine")
    assert said is not None and "hardly knows the language of 100% of the documents" in said
    assert said.endswith("set encoder.name to a model of this language (now mine)")


def test_some_foreign_documents_are_nothing_and_half_of_them_much(english: Tokenizer) -> None:
    some = encoded(english, *[*KNOWN.values()] * 3, FOREIGN["German"])
    assert foreign(english, some, "mine") is None
    half = foreign(english, encoded(english, *KNOWN.values(), *[*FOREIGN.values()][:3]), "mine")
    assert half is not None and "50% of the documents" in half


def test_documents_of_no_words_say_nothing_of_a_language(english: Tokenizer, tiny_encoder: Path) -> None:
    assert english.foreign(encoded(english, "", "42 !", "1802")) == 0
    assert english.foreign(encoded(english)) == 0
    assert Tokenizer.load(tiny_encoder, 16).foreign(encoded(english)) == 0


def test_documents_that_are_cut_off() -> None:
    assert cut_off(10, 100, 256) is None and cut_off(0, 0, 256) is None
    said = cut_off(99, 100, 1_256)
    assert said is not None and "99% of the documents are longer than 1,256 tokens" in said and "raise text.max_tokens" in said


def test_labels_that_every_document_has() -> None:
    def index(*rows: list[str]) -> LabelIndex:
        return LabelIndex.count([pa.array(rows, pa.list_(pa.string()))])

    assert everywhere(index(["x", "a"], ["x", "b"], ["a"])) is None
    assert everywhere(index(["x", "a"], ["x", "b"], [])) is None  # not on the one without labels
    assert "every document has x: nothing in a text speaks for or against such" in str(everywhere(index(["x", "a"], ["x"])))
    assert "every document has x and 1 other labels: " in str(everywhere(index(["x", "y"], ["y", "x", "a"])))


def test_a_loss_that_still_falls() -> None:
    """Small runs: of 8 passes over 1,500 documents of debian-tags, and of 16, which are as good as more."""
    said = unsettled(22.3, 2.31, 1.35)
    assert said is not None and "still fell by 4% of what it was untrained, from 2.31 to 1.35; raise loop.epochs" in said
    assert unsettled(22.3, 0.61, 0.38) is None
    assert unsettled(22.3, 5.0, 9.0) is None and unsettled(22.3, 90.0, 30.0) is None and unsettled(0.0, 0.0, 0.0) is None


def test_a_model_that_has_learnt_nothing() -> None:
    assert rise(20.0, 19.9) is None
    assert "no better than an untrained one" in str(rise(20.0, 20.0))


def test_the_late_loss_is_measured_once_in_the_last_third() -> None:
    measured: list[float] = []
    late = LateLoss(lambda: measured.append(1.0) or 7.0)  # type: ignore[func-returns-value]
    for progress in (0.0, 0.3, 0.6):
        late.update(progress)
    assert late.value is None
    for progress in (0.7, 0.9):
        late.update(progress)
    assert late.value == 7.0 and len(measured) == 1
    resumed = LateLoss(lambda: 7.0, resumed=True)
    resumed.update(0.8)
    assert resumed.value is None  # when it passed the bound, another process was training
    resumed = LateLoss(lambda: 7.0, resumed=True)
    resumed.update(0.5)
    resumed.update(0.8)
    assert resumed.value == 7.0

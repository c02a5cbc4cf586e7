"""Fields from settings to tags and explanations, in one process and through the jobs (decision 0032).

Titles have the labels, bodies the words of others: who joins them cannot tell.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, manifest_of, options, read_night
from in_process import InProcess

from xmc_ray import command
from xmc_ray.bundle.ensemble import Ensemble
from xmc_ray.bundle.explain import ExplainConfig, print_explanation
from xmc_ray.bundle.extend import ExtendConfig, extend_bundle
from xmc_ray.bundle.folder import read_settings
from xmc_ray.bundle.members import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.fields import ids_of, numbers_of
from xmc_ray.data.groups import GroupsConfig
from xmc_ray.data.profile import Profile
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.on_ray import evaluate
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.rerank import RerankConfig
from xmc_ray.on_ray.tag.stage import Tagger
from xmc_ray.on_ray.train import job as train_job
from xmc_ray.on_ray.train import prepare, tune
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig
from xmc_ray.training.recipe import LENGTH, candidates, undecided

FIELDS, FIRST = {"title": 3.0, "body": 0.5}, {"body": 8}
TEXT = {"title": "a red apple", "body": "the red plum and a green pear"}


def rows_of(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        colour, kind, other, further = (str(rng.choice(words)) for words in (COLOURS, KINDS, COLOURS, KINDS))
        title, body = f"a {colour} {kind}", f"a {other} {further} number {number}"
        rows.append({"id": f"{seed}-{number}", "title": title, "body": body, "labels": ["fruit", colour, kind]})
    return rows


def texts_of(rows: list[dict[str, Any]]) -> list[Mapping[str, str | None]]:
    return [{name: row[name] for name in FIELDS} for row in rows]


def config_of(encoder: Path, layers: int, **text: Any) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(name=str(encoder), layers=layers, feature_layers=2, pooling="mean"),
        text=TextConfig(max_tokens=24, **text),
        lexical=LexicalConfig(width=16, columns=4096),
        linear=LinearConfig(candidates=8),
        groups=GroupsConfig(max_size=1),
        model=ModelConfig(dropout=0.1),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=8, batch_size=8, precision="float32"),
    )


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path) -> XMCClassifier:
    """With a transformer, words and a linear ranker."""
    rows = rows_of(160)
    config = config_of(tiny_encoder, 1, fields=FIELDS, first=FIRST)
    return XMCClassifier.fit(texts_of(rows), [row["labels"] for row in rows], config=config, device="cpu")


@pytest.fixture(scope="module")
def bundle(classifier: XMCClassifier, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("fields") / "bundle")
    classifier.save(place)
    return place


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """Also a document without a body, one with a mark in its title, and one without any text."""
    rows = rows_of(20, seed=1)
    rows += [{"id": "bare", "title": "a red plum", "body": None, "labels": ["fruit", "red", "plum"]}]
    rows += [{"id": "mark", "title": "a green\x1fpear", "body": "x", "labels": ["fruit", "green", "pear"]}]
    rows += [{"id": "none", "title": None, "body": None, "labels": ["fruit"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    return tmp_path / "documents.parquet"


def test_titles_are_told_from_bodies(classifier: XMCClassifier, tiny_encoder: Path) -> None:
    rows, test = rows_of(160), rows_of(60, seed=2)
    labels, truth = ([row["labels"] for row in part] for part in (rows, test))
    assert classifier.evaluate(texts_of(test), truth)["total"]["P@3"] > 0.95
    table = {name: [row[name] for row in test] for name in FIELDS}
    assert classifier.predict(table, k=3) == classifier.predict(texts_of(test), k=3)
    words = config_of(tiny_encoder, 0)
    joined = [[f"{row['body']} {row['title']}" for row in part] for part in (rows, test)]
    without = XMCClassifier.fit(joined[0], labels, config=words, device="cpu").evaluate(joined[1], truth)["total"]["P@3"]
    fields = XMCClassifier.fit(
        texts_of(rows), labels, config=replace(words, text=TextConfig(max_tokens=24, fields=FIELDS)), device="cpu"
    )
    assert fields.evaluate(texts_of(test), truth)["total"]["P@3"] > without + 0.02


def test_a_bundle_keeps_its_fields(classifier: XMCClassifier, bundle: str, tiny_encoder: Path, tmp_path: Path) -> None:
    again, rows = XMCClassifier.load(bundle, device="cpu"), texts_of(rows_of(10, seed=3))
    for before, after in zip(classifier.predict(rows, k=3), again.predict(rows, k=3), strict=True):
        assert [label for label, _ in after] == [label for label, _ in before]
        assert [score for _, score in after] == pytest.approx([score for _, score in before])
    settings = read_settings(bundle)
    assert settings["xmc_ray_format"] == 5
    assert settings["fields"] == [
        {"name": "title", "weight": 3.0, "first": None},
        {"name": "body", "weight": 0.5, "first": 8},
    ]
    card = Path(bundle, "README.md").read_text()
    assert "- fields: `title` of weight 3; `body` of weight 0.5, its first 8 tokens\n" in card
    assert 'predict([{"title": "some text", "body": "some text"}], k=5)' in card
    plain = XMCClassifier.fit(["a red apple", "a plum"] * 4, [["red"], ["plum"]] * 4, config=config_of(tiny_encoder, 0))
    plain.save(str(tmp_path / "plain"))
    assert read_settings(str(tmp_path / "plain"))["xmc_ray_format"] == 4
    assert "fields" not in read_settings(str(tmp_path / "plain"))
    with pytest.raises(DataError, match=r"not a string: texts\[0\]; found dict"):
        plain.predict([TEXT])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"a text without fields: texts\[0\]; found str 'a red apple'"):
        classifier.predict(["a red apple"])


def test_bundles_of_an_ensemble_read_the_same_fields(classifier: XMCClassifier, bundle: str, tiny_encoder: Path) -> None:
    (one,) = classifier.ensemble.bundles
    fields = one.tokenizer.fields
    heavier = replace(one, tokenizer=Tokenizer.load(tiny_encoder, 24, (fields[0]._replace(weight=9.0), fields[1])))
    longer = replace(one, tokenizer=Tokenizer.load(tiny_encoder, 24, (fields[0], fields[1]._replace(first=None))))
    assert len(Ensemble([one, heavier]).tokenizers) == 1 and len(Ensemble([one, longer]).tokenizers) == 2
    plain, turned = (replace(one, tokenizer=Tokenizer.load(tiny_encoder, 24, kept)) for kept in ((), fields[::-1]))
    with pytest.raises(ModelError, match=r"read different fields: .*; found no fields; expected title, body as in"):
        Ensemble([one, plain])
    with pytest.raises(ModelError, match="found body, title; expected title, body as in"):
        Ensemble([one, turned])
    assert Members.read([bundle, bundle]).fields == [fields, fields]


@pytest.mark.parametrize("label", ["red", "plum", "fruit"])
def test_an_explanation_names_the_field_of_each_word(label: str, classifier: XMCClassifier) -> None:
    """Contributions against scores of the text without a word, in its own field alone; factors make up the score."""
    found = classifier.explain(TEXT, label)

    def log_odds(text: Mapping[str, str]) -> float:
        score = dict(classifier.predict([text], k=8)[0])[label]
        return math.log(score / (1 - score))

    assert [(word.field, word.word) for word in found.words] == [(name, word) for name in FIELDS for word in TEXT[name].split()]
    for word in found.words:
        assert word.field is not None and word.contribution is not None
        kept = " ".join(part for part in TEXT[word.field].split() if part != word.word)
        worth = log_odds(TEXT) - log_odds(TEXT | {word.field: kept})
        assert word.contribution == pytest.approx(worth, abs=2e-3)
    (path,) = found.paths
    assert path.recall * path.linear == pytest.approx(path.score, abs=1e-6)
    assert path.score == pytest.approx(dict(classifier.predict([TEXT], k=8)[0])[label], abs=1e-5)
    assert (found.text, found.fields) == ("\n".join(TEXT.values()), TEXT)
    assert " title: red" in str(found) and "\ntitle: [" in str(found) and "\nbody: " in str(found)


def test_words_behind_a_fields_limit_are_not_read(classifier: XMCClassifier) -> None:
    found = classifier.explain({"title": "red", "body": "a plum " * 4 + "green"}, "red")
    assert [(word.word, word.contribution is None) for word in found.words] == [
        ("red", False),
        ("a", False),
        ("plum", False),
        ("green", True),
    ]


def test_the_job_that_explains(bundle: str, catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"bundle": bundle, "label": "red", "documents": DocumentsConfig(uri=str(catalogue), text=[*FIELDS])}
    found = print_explanation(ExplainConfig(**given, fields=TEXT))  # type: ignore[arg-type]
    assert str(found) in capsys.readouterr().out
    assert any("a red" in near.text and "\n" in near.text for near in found.neighbours)
    for wrong, told in (
        ({"text": "a red apple"}, "the bundle does not read this; found text; expected fields: title, body"),
        ({"fields": {"end": "x"}}, "the bundle does not read this; found end; expected fields: title, body"),
        ({}, "nothing to explain, or two texts; found neither"),
        ({"text": "a", "fields": TEXT}, "nothing to explain, or two texts; found both"),
    ):
        with pytest.raises(ConfigError, match=told):
            print_explanation(ExplainConfig(**given, **wrong))  # type: ignore[arg-type]


def test_labels_are_added_from_fields(bundle: str, catalogue: Path, tmp_path: Path) -> None:
    rows = pq.read_table(catalogue).to_pylist()
    for row in rows:
        row["labels"] = [*row["labels"], "new"] if row["title"] and "plum" in row["title"] else row["labels"]
    pq.write_table(pa.Table.from_pylist(rows), catalogue)
    documents = DocumentsConfig(uri=str(catalogue), text=[*FIELDS])
    given = {"bundle": bundle, "output": str(tmp_path / "extended"), "max_reject_share": 0.1}
    extend_bundle(ExtendConfig(documents=documents, **given))  # type: ignore[arg-type]
    extended = XMCClassifier.load(str(tmp_path / "extended"), device="cpu")
    tags = dict(extended.predict([{"title": "a green plum"}], k=9)[0])
    assert tags["new"] > dict(extended.predict([{"title": "a green pear", "body": "a plum"}], k=9)[0])["new"]
    with pytest.raises(ConfigError, match=r"documents\.text does not list the model's fields"):
        extend_bundle(ExtendConfig(documents=DocumentsConfig(uri=str(catalogue)), **given | {"output": str(tmp_path / "no")}))  # type: ignore[arg-type]


def test_a_night_reads_fields(bundle: str, catalogue: Path, tmp_path: Path) -> None:
    def tag(*further: str) -> str:
        given = {"documents.uri": catalogue, "bundle": bundle, "output": tmp_path / "out", "date": "2026-11-23"}
        given |= {"k": 3, "pool.max": 1, "pool.threads": 1, "max_reject_share": 0.1, "model.precision": "float32"}
        arguments = [f"--{name}={value}" for name, value in given.items()]
        return job.tag(command.parse(TagConfig, [*arguments, *further]), InProcess())

    told = "found .*; expected title, body; set documents.text to the fields in this order"
    for text in ('["text"]', '["body", "title"]', '["title"]'):
        with pytest.raises(ConfigError, match=told):
            tag(f"--documents.text={text}")
    assert not (tmp_path / "out").exists()
    folder = tag('--documents.text=["title", "body"]')
    tags, rejects = read_night(folder)
    assert rejects["reason"].to_pylist() == ["text is null"]
    rows = {row["id"]: row for row in pq.read_table(catalogue).to_pylist()}
    texts = texts_of([rows[name] for name in tags["id"].to_pylist()])
    expected = XMCClassifier.load(bundle, device="cpu").predict(texts, k=3)
    assert tags["labels"].to_pylist() == [[label for label, _ in row] for row in expected]
    assert {*next(row["labels"] for row in tags.to_pylist() if row["id"] == "mark")} == {"fruit", "green", "pear"}
    page = Path(folder, "report.html").read_text()
    assert "\x1f" not in page and manifest_of(folder)["config"]["documents"]["text"] == ["title", "body"]


def trained_by(catalogue: Path, encoder: Path, output: Path, *further: str) -> list[str]:
    """Options of the training job, words alone."""
    texts = '--documents.text=["title", "body"]', "--text.fields.title=3", "--text.fields.body=0.5", "--text.first.body=8"
    words = "--encoder.layers=0", "--lexical.width=16", "--lexical.columns=4096", "--groups.max_size=1", "--loop.epochs=6"
    own = f"--documents.uri={catalogue}", *texts, *words, "--max_reject_share=0.1"
    return [option for option in options(catalogue.parent, encoder, output) if "label_names" not in option] + [*own, *further]


def test_a_stage_reads_fields_and_a_hook_sees_no_marks(bundle: str, catalogue: Path) -> None:
    """Columns that are not the bundle's fields would be read as its first one."""
    rows = pq.read_table(catalogue).drop_columns(["labels"])
    pool = PoolConfig(threads=1)
    for text in ("title", ["body", "title"]):
        with pytest.raises(ConfigError, match=r"found .*; expected title, body"):
            Tagger(bundle, text=text, pool=pool)
    tagger = Tagger(bundle, text=["title", "body"], k=3, pool=pool, precision="float32")
    tagged = tagger(rows).filter(pc.is_valid(rows["title"]))
    expected = XMCClassifier.load(bundle, device="cpu").predict(texts_of(tagged.to_pylist()), k=3)
    assert tagged["labels"].to_pylist() == [[label for label, _ in row] for row in expected]
    hook = RerankConfig(function="hooks:InText", version="1", candidates=4)
    texts = Tagger(bundle, text=["title", "body"], k=3, pool=pool, rerank=hook).tokens(rows)["text"]
    assert "a red plum\n" in texts.to_pylist() and not any("\x1f" in text for text in texts.drop_null().to_pylist())


@pytest.mark.usefixtures("ray_session")
def test_training_and_evaluation_on_ray(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(240)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    arguments = trained_by(tmp_path / "train.parquet", tiny_encoder, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"documents\.text does not list the model's fields"):
        command.parse(train_job.TrainConfig, [*arguments, '--documents.text=["title"]'])
    config = command.parse(train_job.TrainConfig, arguments)
    place = train_job.run(config)
    assert "fields" in read_settings(place) and "\x1f" not in Path(tmp_path, "run", "report.html").read_text()
    with pytest.raises(ConfigError, match=r"other settings: .*; found text\.fields\.title = 3\.0 instead of 4\.0"):
        train_job.run(command.parse(train_job.TrainConfig, [*arguments, "--text.fields.title=4"]))
    test = rows_of(40, seed=5)
    pq.write_table(pa.Table.from_pylist(test), tmp_path / "test.parquet")
    given = [f"--documents.uri={tmp_path}/test.parquet", f"--bundle={place}", "--pool.max=1", "--pool.threads=1"]
    result = evaluate.evaluate(command.parse(evaluate.EvaluateConfig, [*given, '--documents.text=["title", "body"]']))
    expected = XMCClassifier.load(place, device="cpu").evaluate(texts_of(test), [row["labels"] for row in test])
    assert result["total"] == expected["total"] and result["total"]["P@3"] > 0.8
    with pytest.raises(ConfigError, match="found text; expected title, body"):
        evaluate.evaluate(command.parse(evaluate.EvaluateConfig, given))


@pytest.mark.usefixtures("ray_session")
def test_the_tuning_job_keeps_the_fields(
    tiny_encoder: Path, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"--documents.uri={catalogue}", f"--encoder={tiny_encoder}", f"--output={tmp_path}/tuned", "--minutes=0.1"
    fields = '--documents.text=["title", "body"]', "--text.fields.title=3", "--text.fields.body=0.5", "--text.first.body=8"
    with pytest.raises(ConfigError, match=r"documents\.text does not list the model's fields"):
        command.parse(tune.TuneConfig, [*settings, *fields[1:]])
    with pytest.raises(ConfigError, match=r"an automatic recipe decides text\.max_tokens"):
        command.parse(tune.TuneConfig, [*settings, "--text.max_tokens=64"])
    trained: list[train_job.TrainConfig] = []
    monkeypatch.setattr(train_job, "run", lambda config: trained.append(config) or "bundle")
    tune.run(command.parse(tune.TuneConfig, [*settings, *fields, "--max_reject_share=0.1"]))
    (config,) = trained
    assert config.text == TextConfig(max_tokens=LENGTH, fields={"title": 3.0, "body": 0.5}, first={"body": 8})


@pytest.mark.usefixtures("ray_session")
def test_tokens_in_the_cache_know_their_field(tiny_encoder: Path, tmp_path: Path, catalogue: Path) -> None:
    """They are never taken for those of other limits, or of joined columns; a weight changes none."""

    def prepared(*further: str) -> prepare.Prepared:
        arguments = trained_by(
            catalogue, tiny_encoder, tmp_path / "unused", f"--cache={tmp_path / 'cache'}", "--validation.share=0"
        )
        return prepare.prepare(command.parse(train_job.TrainConfig, [*arguments, *further]))

    first, heavier, shorter = prepared(), prepared("--text.fields.title=9"), prepared("--text.first.body=2")
    joined = prepared("--text.fields=null", "--text.first=null")
    places = [each.tokens.folder for each in (first, heavier, shorter, joined)]
    assert places[0] == places[1] and len({*places}) == 3
    (chunk,) = first.tokens.chunks("train")
    numbers = [[numbers_of(token) for token in row] for row in chunk["tokens"].to_pylist()]
    assert all(row == sorted(row) and {*row} == {0, 1} and row.count(1) <= 8 + 1 for row in numbers)
    (plain,) = joined.tokens.chunks("train")
    assert all(token == ids_of(token) for row in plain["tokens"].to_pylist() for token in row)


def test_a_recipe_by_rule_keeps_the_fields(tiny_encoder: Path) -> None:
    kept = TextConfig(fields=FIELDS, first=FIRST)
    config = undecided(FitConfig(encoder=EncoderConfig(name=str(tiny_encoder)), text=kept))
    profile = Profile(
        **dict.fromkeys(("documents", "longest"), 1000),
        **dict.fromkeys(("labels", "everywhere"), 8),
        **dict.fromkeys(("tokens", "labels_per_document", "rare", "typical", "single", "repeated"), 1.0),
    )
    assert all(each.config.text == replace(kept, max_tokens=LENGTH) for each in candidates(profile, config, 0))

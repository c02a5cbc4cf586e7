"""The jobs end to end on Ray, called in process with tiny configs; their bad input as a user meets it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import S3
from fruit import COLOURS, KINDS, options
from safetensors.torch import load_file

from xmc_ray import command, evaluation, tagging, training
from xmc_ray.classifier import FitConfig, XMCClassifier
from xmc_ray.encoder import EncoderConfig
from xmc_ray.ensemble import Members
from xmc_ray.errors import ConfigError, DataError, ModelError, XmcError
from xmc_ray.groups import GroupsConfig
from xmc_ray.loop import LoopConfig
from xmc_ray.optim import OptimConfig
from xmc_ray.text import TextConfig

pytestmark = pytest.mark.usefixtures("ray_session")


def train(*arguments: Any) -> str:
    return training.run(command.parse(training.TrainConfig, options(*arguments)))


@pytest.fixture(scope="module")
def trained(fruit: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model trained by one worker."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(fruit, tiny_encoder, output, f"--cache={output.parent / 'cache'}")
    return output


def test_one_worker_learns_and_leaves_a_run_folder(trained: Path) -> None:
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scores = [entry["validation/P@1"] for entry in entries if "validation/P@1" in entry]
    assert len(scores) >= 2 and scores[-1] > 0.9
    assert any("documents_per_second" in entry for entry in entries)
    assert list((trained / "tensorboard").glob("events*"))
    assert "seed = 6088" in (trained / "run.toml").read_text()
    assert list((trained / "checkpoints").rglob("checkpoint.json"))
    bundle = XMCClassifier.load(str(trained / "bundle"))
    (tags,) = bundle.predict(["a green plum"], k=3)
    assert {label for label, _ in tags} == {"fruit", "green", "plum"}
    assert bundle.bundle.metrics["P@1"] == max(scores)


def test_two_workers_on_object_storage(fruit: Path, tiny_encoder: Path, s3: S3, trained: Path) -> None:
    uri = s3.uri("runs/two")
    bundle = train(fruit, os.path.relpath(tiny_encoder), uri, "--workers.count=2")
    (tags,) = XMCClassifier.load(bundle).predict(["a yellow grape"], k=3)
    assert {label for label, _ in tags} == {"fruit", "yellow", "grape"}


def test_evaluate_equals_the_classifier(fruit: Path, trained: Path, tmp_path: Path) -> None:
    config = {"documents.uri": fruit / "test.parquet", "bundle": trained / "bundle", "output": tmp_path / "evaluation"}
    arguments = [f"--{name}={value}" for name, value in config.items()]
    result = evaluation.run(command.parse(evaluation.EvaluateConfig, [*arguments, "--pool.batch_rows=7", "--pool.threads=1"]))
    test = pq.read_table(fruit / "test.parquet")
    expected = XMCClassifier.load(str(trained / "bundle")).evaluate(test["text"].to_pylist(), test["labels"].to_pylist())
    assert result["total"] == expected["total"] and result["bands"] == expected["bands"]
    assert result["total"]["P@1"] > 0.9
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == result
    with pytest.raises(ConfigError, match="there already"):
        evaluation.run(command.parse(evaluation.EvaluateConfig, arguments))


def test_evaluate_without_a_known_label(trained: Path, tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "a red apple", "labels": ["unheard of"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    arguments = [f"--documents.uri={tmp_path / 'test.parquet'}", f"--bundle={trained / 'bundle'}", "--pool.threads=1"]
    with pytest.raises(DataError, match="no document has a label that the bundle knows"):
        evaluation.run(command.parse(evaluation.EvaluateConfig, arguments))


def tag(*arguments: str) -> Path:
    return Path(tagging.run(command.parse(tagging.TagConfig, list(arguments))))


def test_tag_keeps_every_row(trained: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"{n}", "text": f"a {COLOURS[n % 3]} {KINDS[n % 4]}"} for n in range(30)]
    rows += [{"id": "null", "text": None}, {"id": "empty", "text": "  "}, {"id": "number", "text": 7}, {"text": "no id"}]
    rows += [{"id": "long", "text": "red apple " * 200}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    arguments = [
        f"--documents.uri={tmp_path / 'in.jsonl'}",
        f"--bundle={trained / 'bundle'}",
        f"--output={tmp_path / 'out'}",
        "--date=2026-11-23",
        "--k=3",
        "--pool.batch_rows=8",
        "--pool.threads=1",
    ]
    folder = tag(*arguments)
    assert folder.name == "dt=2026-11-23"
    tags = pq.read_table(sorted(folder.glob("part-*.parquet")), partitioning=None)
    rejects = pq.read_table(sorted((folder / "rejects").glob("part-*.parquet")), partitioning=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(tags["id"].to_pylist()) == sorted([*(f"{n}" for n in range(30)), "long"])
    assert (manifest["in"], manifest["tagged"], manifest["rejected"], manifest["truncated"]) == (36, 31, 5, 1)
    assert len(rejects) == 5 and all(rejects["reason"].to_pylist())
    for row in tags.to_pylist():
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["labels"]) == len(set(row["labels"])) == 3
        assert row["model"] == manifest["bundle"]
    named = {label: name for row in tags.to_pylist() for label, name in zip(row["labels"], row["names"], strict=True)}
    assert named["red"] == "RED" and named["apple"] is None
    text = dict(zip((row.get("id") for row in rows), (row["text"] for row in rows), strict=True))
    classifier = XMCClassifier.load(str(trained / "bundle"))
    for row in tags.slice(0, 5).to_pylist():
        (expected,) = classifier.predict([text[row["id"]]], k=3)
        assert row["labels"] == [label for label, _ in expected]

    # again: nothing to do; something else: refused; a folder without _SUCCESS: started anew
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert tag(*arguments) == folder
    with pytest.raises(ConfigError, match="another run"):
        tag(*arguments, "--min_score=0.5")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    (folder / "_SUCCESS").unlink()
    (folder / "part-half.parquet").write_bytes(b"PAR1 half a file")
    tag(*arguments)
    assert (folder / "_SUCCESS").exists() and not (folder / "part-half.parquet").exists()
    tag(*arguments, "--min_score=0.5", "--overwrite=true")
    scores = pq.read_table(sorted(folder.glob("part-*.parquet")), partitioning=None)["scores"].to_pylist()
    assert min(score for row in scores for score in row) >= 0.5


@pytest.fixture(scope="module")
def bundles(fruit: Path, trained: Path, other_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The trained bundle, and one with another encoder and tokenizer, shorter texts and no groups, half trained."""
    train = pq.read_table(fruit / "train.parquet")
    config = FitConfig(
        encoder=EncoderConfig(name=str(other_encoder), feature_layers=2, pooling="mean"),
        text=TextConfig(max_tokens=8),
        groups=GroupsConfig(max_size=1),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=2, batch_size=8),
    )
    classifier = XMCClassifier.fit(train["text"].to_pylist(), train["labels"].to_pylist(), config=config)
    other = str(tmp_path_factory.mktemp("bundles") / "other")
    classifier.save(other)
    return [str(trained / "bundle"), other]


def test_evaluate_an_ensemble(fruit: Path, bundles: list[str]) -> None:
    arguments = [f"--documents.uri={fruit / 'test.parquet'}", f"--bundle={json.dumps(bundles)}", "--pool.threads=1"]
    result = evaluation.run(command.parse(evaluation.EvaluateConfig, [*arguments, "--pool.batch_rows=7"]))
    test = pq.read_table(fruit / "test.parquet")
    expected = XMCClassifier.load(bundles).evaluate(test["text"].to_pylist(), test["labels"].to_pylist())
    assert result["total"] == expected["total"] and result["bands"] == expected["bands"]
    assert result["bundle"] == Members.read(bundles).fingerprint


def test_tag_with_an_ensemble(bundles: list[str], tmp_path: Path) -> None:
    texts = {f"{n}": f"a {COLOURS[n % 3]} {KINDS[n % 4]}" for n in range(20)}
    texts["long"] = "red apple " * 10  # for one of the two models
    rows = [{"id": number, "text": text} for number, text in [*texts.items(), ("null", None)]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    (tmp_path / "tag.toml").write_text(f"bundle = {json.dumps(bundles)}\n")
    arguments = [f"--config={tmp_path / 'tag.toml'}", f"--documents.uri={tmp_path / 'in.parquet'}", "--date=2026-11-23"]
    arguments += [f"--output={tmp_path / 'out'}", "--k=2", "--pool.batch_rows=8", "--pool.threads=1"]
    folder = tag(*arguments)
    tags = pq.read_table(sorted(folder.glob("part-*.parquet")), partitioning=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["in"], manifest["tagged"], manifest["rejected"], manifest["truncated"]) == (22, 21, 1, 1)
    assert manifest["bundle"] == Members.read(bundles).fingerprint and set(tags["model"].to_pylist()) == {manifest["bundle"]}
    expected = dict(zip(texts, XMCClassifier.load(bundles).predict(list(texts.values()), k=2), strict=True))
    for row in tags.to_pylist():
        assert row["labels"] == [label for label, _ in expected[row["id"]]]
        assert row["scores"] == pytest.approx([score for _, score in expected[row["id"]]], rel=1e-4)
    named = {label: name for row in tags.to_pylist() for label, name in zip(row["labels"], row["names"], strict=True)}
    assert named["fruit"] == "FRUIT"  # the second bundle has no names

    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    assert tag(*arguments) == folder
    for others in (bundles[::-1], bundles[:1], bundles[0]):
        with pytest.raises(ConfigError, match="another run"):
            tag(*arguments, f"--bundle={others if isinstance(others, str) else json.dumps(others)}")
    with pytest.raises(ConfigError, match="no bundle is given"):
        tag(*arguments, "--bundle=[]")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_tag_on_object_storage(trained: Path, s3: S3, fruit: Path) -> None:
    from xmc_ray import storage

    storage.upload(trained / "bundle", s3.uri("bundles/fruit"), last="config.json")
    storage.write_bytes(s3.uri("catalogue/test.parquet"), (fruit / "test.parquet").read_bytes())
    arguments = {
        "documents.uri": s3.uri("catalogue"),
        "bundle": s3.uri("bundles/fruit"),
        "output": s3.uri("tags"),
        "date": "2026-01-02",
    }
    folder = tagging.run(command.parse(tagging.TagConfig, [f"--{name}={value}" for name, value in arguments.items()]))
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    assert manifest["tagged"] == manifest["in"] == 48
    assert storage.exists(storage.join(folder, "_SUCCESS"))


def test_foreign_folder_is_left_alone(trained: Path, fruit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dt=2026-01-01"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    config = {"documents.uri": fruit / "test.parquet", "bundle": trained / "bundle", "output": tmp_path, "date": "2026-01-01"}
    for overwrite in ("false", "true"):
        with pytest.raises(ConfigError, match="something else"):
            tag(*(f"--{name}={value}" for name, value in config.items()), f"--overwrite={overwrite}")
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


BAD = {
    "missing file": (["--documents.uri=/nowhere/x.parquet"], DataError, "/nowhere/x.parquet"),
    "encoder not found": (["--encoder.name=/nowhere/encoder"], ModelError, "/nowhere/encoder"),
    "wrong column": (['--documents.text=["words"]'], DataError, "words"),
    "no label names": (["--label_names=/nowhere/names.parquet"], DataError, "/nowhere/names.parquet"),
    "more workers than groups": (["--workers.count=5"], ConfigError, "5 workers, 4 groups"),
    "batch and workers": (["--workers.count=4", "--loop.batch_size=3"], ConfigError, "cannot share a batch"),
    "nothing to resume from": (["--resume=/nowhere/checkpoint"], ModelError, "/nowhere/checkpoint"),
    "gpu where there is none": (["--workers.gpu=true"], ConfigError, "GPU"),
    "too many tokens": (["--text.max_tokens=100000"], ConfigError, "max_tokens"),
    "too many layers": (["--encoder.layers=99"], ConfigError, "encoder.layers"),
    "non-finite loss": (["--optim.rows_lr=1e30", "--optim.warmup=0", "--optim.clip_norm=0"], ModelError, "step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_training_input_is_one_clear_line(case: str, fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    further, kind, told = BAD[case]
    with pytest.raises(XmcError) as caught:
        train(fruit, tiny_encoder, tmp_path / "run", *further)
    assert type(caught.value) is kind
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "bundle").exists()


RESUMED: dict[str, tuple[list[str], Callable[[dict[str, Any]], Any], str]] = {
    "another label set": ([], lambda marker: marker["identity"].update(labels="0123"), "other labels"),
    "another model shape": (["--model.bottleneck=8"], lambda marker: None, "other model"),
    "other batches": (["--loop.batch_size=12"], lambda marker: None, "other documents"),
    "a newer format": ([], lambda marker: marker.update(xmc_ray_checkpoint=99), "newer format"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_start_that_does_not_fit_is_told_before_any_training(
    case: str, fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path
) -> None:
    further, change, told = RESUMED[case]
    shutil.copytree(sorted((trained / "checkpoints").glob("step-*"))[-1], tmp_path / "step-000000270")
    marker = tmp_path / "step-000000270" / "checkpoint.json"
    content = json.loads(marker.read_text())
    change(content)
    marker.write_text(json.dumps(content))
    start, cache = f"--resume={tmp_path / 'step-000000270'}", f"--cache={trained.parent / 'cache'}"
    with pytest.raises(ModelError, match=told):
        train(fruit, tiny_encoder, tmp_path / "run", start, cache, *further)
    assert not (tmp_path / "run").exists()


def test_a_run_begins_at_the_checkpoint_it_is_given(
    fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On fewer workers than asked for, since the cluster has no room for more."""
    first = sorted((trained / "checkpoints").glob("step-*"))[0]
    room_for_one = ["--workers.count=2", "--workers.least=1", "--workers.cpus=4"]
    train(fruit, tiny_encoder, tmp_path / "run", f"--resume={first}", f"--cache={trained.parent / 'cache'}", *room_for_one)
    step = int(first.name.removeprefix("step-"))
    assert f"training with 1 workers after step {step}, saved by 1: {first}" in capfd.readouterr().out
    bundles = [load_file(folder / "bundle" / "model.safetensors") for folder in (trained, tmp_path / "run")]
    assert all(torch.equal(tensor, bundles[1][name]) for name, tensor in bundles[0].items())


def test_a_run_killed_in_its_last_validation_has_it_after_all(
    fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path
) -> None:
    """What such a run leaves: its last step is saved, without a score, and there is no bundle."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    settings = (tmp_path / "run" / "run.toml").read_text()
    (tmp_path / "run" / "run.toml").write_text(settings.replace(str(trained), str(tmp_path / "run")))
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "checkpoint.json"
    marker = json.loads(newest.read_text())
    expected = marker["metrics"]
    newest.write_text(json.dumps(marker | {"score": None, "metrics": {}}))
    train(fruit, tiny_encoder, tmp_path / "run", f"--cache={trained.parent / 'cache'}")
    assert expected and json.loads(newest.read_text())["metrics"] == expected
    bundles = [load_file(folder / "bundle" / "model.safetensors") for folder in (trained, tmp_path / "run")]
    assert all(torch.equal(tensor, bundles[1][name]) for name, tensor in bundles[0].items())


@pytest.mark.parametrize(
    ("labels", "told"),
    [([], "empty|no input|no document"), ([[], []], "no document has a label"), ([None, None], "no document has a label")],
)
def test_empty_and_unlabelled_data(labels: list[Any], told: str, tiny_encoder: Path, tmp_path: Path) -> None:
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string())})
    rows = [{"id": f"{n}", "text": "a red apple", "labels": row} for n, row in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "train.parquet")
    pq.write_table(pa.table({"label": ["red"], "name": ["Red"]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=told):
        train(tmp_path, tiny_encoder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone_and_another_is_refused(fruit: Path, tiny_encoder: Path, trained: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    assert train(fruit, tiny_encoder, trained, "--workers.count=2") == str(trained / "bundle")
    with pytest.raises(ConfigError, match=r"other settings: .*found rows_lr = 0.02; expected rows_lr = 0.5"):
        train(fruit, tiny_encoder, trained, "--optim.rows_lr=0.5")
    with pytest.raises(ConfigError, match="not empty"):
        train(fruit, tiny_encoder, trained, "--resume=never")
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_a_folder_of_something_else_is_refused(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty: .*precious\.txt"):
        train(fruit, tiny_encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_half_written_bundle_is_refused(fruit: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "bundle", tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = {"documents.uri": fruit / "test.parquet", "bundle": tmp_path / "bundle", "output": tmp_path / "out"}
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        tag(*(f"--{name}={value}" for name, value in config.items()))
    assert not (tmp_path / "out").exists()

"""The blocks of docs/ecosystem.md run as they are printed."""

import gzip
import os
import re
import shlex
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from followers import trackers_in
from mlflow import MlflowClient

from xmc_ray.command import parse
from xmc_ray.data import convert
from xmc_ray.data.reader import read_rows
from xmc_ray.on_ray.train.config import TrainConfig

SECTIONS = dict(re.findall(r"^##+ (.+?)\n(.*?)(?=^##|\Z)", (ROOT / "docs" / "ecosystem.md").read_text(), re.M | re.S))


def commands(section: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", SECTIONS[section], flags=re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def example(encoder: Path) -> dict[str, object]:
    """What the blocks of Python take for granted: ``config``, ``texts`` and ``labels``."""
    from xmc_ray import EncoderConfig, FitConfig, LexicalConfig, LoopConfig

    pairs = [(colour, kind) for _ in range(4) for colour in ("red", "green") for kind in ("apple", "pear")]
    return {
        "config": FitConfig(
            encoder=EncoderConfig(name=str(encoder), layers=0),
            lexical=LexicalConfig(width=16, columns=1024),
            loop=LoopConfig(epochs=20, batch_size=4),
        ),
        "texts": [f"a {colour} {kind}" for colour, kind in pairs],
        "labels": [[colour, kind] for colour, kind in pairs],
    }


def test_documents_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("articles.csv").write_text('id,text,labels\n1,"a red, red apple",red; apple\n2,a pear,pear\n')
    ((job, *options),) = commands("Formats")
    config = parse(TrainConfig, options)
    assert job == "train"
    (table,) = read_rows(config.documents, labelled=True)
    assert table["labels"].to_pylist() == [["red", "apple"], ["pear"]]


def test_corpora_of_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("titles.tsv.gz").write_bytes(gzip.compress(b"A red apple\t<http://e.org/red>\n"))
    Path("vocabulary.ttl").write_text(
        "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .\n"
        '<http://e.org/red> a skos:Concept ; skos:prefLabel "red"@en .\n'
    )
    for folder in ("fulltext", "letters", "data"):
        Path(folder).mkdir()
    Path("fulltext/a.txt").write_text("red")
    Path("fulltext/a.key").write_text("red\n")
    Path("letters/b.txt").write_text("dear")
    Path("letters.csv").write_text("file,labels\nb.txt,old;dear\n")
    for line in commands("Corpora of other tools"):
        job, *options = line
        assert job == "convert"
        convert.run(parse(convert.ConvertConfig, options))
    labels = {name: pq.read_table(f"data/{name}.parquet")["labels"].to_pylist() for name in ("titles", "texts", "letters")}
    assert labels == {"titles": [["http://e.org/red"]], "texts": [["http://e.org/red"]], "letters": [["old", "dear"]]}
    assert pq.read_table("data/labels.parquet").to_pylist() == [{"label": "http://e.org/red", "name": "red"}]


def test_the_estimator(tiny_encoder: Path) -> None:
    pytest.importorskip("sklearn")
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS["scikit-learn"], flags=re.S)
    names = example(tiny_encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    assert len(names["scores"]) == 2  # type: ignore[arg-type]
    (row,) = names["probabilities"].toarray()  # type: ignore[attr-defined]
    assert {names["estimator"].classes_[place] for place in row.argsort()[-2:]} == {"red", "apple"}  # type: ignore[attr-defined]


def test_a_run_in_a_tracker(
    ray_session: None, fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_ray.on_ray.train import job

    trackers_in(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCODER", str(tiny_encoder))
    Path("train.parquet").symlink_to(fruit / "train.parquet")
    ((name, *options),) = commands("Trackers")
    config = parse(TrainConfig, [os.path.expandvars(option) for option in options])
    assert name == "train"
    bundle = job.run(config)
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.tags["xmc_ray.bundle"] == bundle
    names = {*run.data.metrics, *run.data.params, *run.data.tags}
    for promised in re.findall(r"`((?:train|validation|final|xmc_ray)[./]\w+)`", SECTIONS["Trackers"]):
        assert promised in names, promised


def test_a_callback_of_ones_own(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers_in(tmp_path, monkeypatch)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS["Trackers"], flags=re.S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, example(tiny_encoder))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1: loss ") and last.startswith("step 80: loss ")
    (run,) = MlflowClient().search_runs(["0"])
    history = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert history[0].step == 1 and history[-1].step == 80
    assert run.data.params["lexical.width"] == "16" and run.data.metrics["final/sample_loss"] > 0

"""The tagging job with a tiny model: every id once, whatever the input holds. Most nights are computed in process."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, contents, document, manifest_of, read_night, write
from in_process import InProcess

from xmc_ray import __version__, command
from xmc_ray.bundle.members import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.errors import ConfigError, DataError, ModelError, XmcError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.on_ray import evaluate
from xmc_ray.on_ray.evaluate import evaluate_bundle
from xmc_ray.on_ray.predictor import Predictor
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.nights import tags_folder
from xmc_ray.on_ray.tag.pieces import PieceWriter
from xmc_ray.storage.files import join
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig


def test_a_night_has_every_row_once_and_is_made_once(tag: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"{n}", "text": f"a {COLOURS[n % 3]} {KINDS[n % 4]}"} for n in range(30)]
    rows += [{"id": "null", "text": None}, {"id": "empty", "text": "  "}, {"id": "number", "text": 7}, {"text": "no id"}]
    rows += [{"id": "long", "text": "red apple " * 200}, {"id": "null", "text": "a red plum"}]
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")
    again = {"max_reject_share": 0.2, "commit_rows": 10}
    folder = tag(tmp_path / "in.jsonl", **again)
    assert Path(folder).name == "dt=2026-11-23"
    tags, rejects = read_night(folder)
    manifest = manifest_of(folder)
    assert tags["id"].to_pylist() == [*(f"{n}" for n in range(30)), "long", "null"], "the first row of an id that can be tagged"
    assert [manifest[name] for name in ("in", "tagged", "rejected", "truncated", "reused")] == [37, 32, 5, 1, 0]
    assert rejects["row"].to_pylist() == [30, 31, 32, 33, 36] and all(rejects["reason"].to_pylist())
    assert set(rejects["file"].to_pylist()) == {str(tmp_path / "in.jsonl")}
    assert rejects["id"].to_pylist() == ["null", "empty", "number", None, None]
    for row in tags.to_pylist():
        assert row["scores"] == sorted(row["scores"], reverse=True) and len(row["labels"]) == len(set(row["labels"])) == 3
        assert row["model"] == manifest["bundle"]
    named = {label: name for row in tags.to_pylist() for label, name in zip(row["labels"], row["names"], strict=True)}
    assert named["red"] == "RED" and named["apple"] is None
    text = {row.get("id"): row["text"] for row in rows}
    classifier = XMCClassifier.load(str(trained / "bundle"))
    for row in tags.slice(0, 5).to_pylist():
        assert row["labels"] == [label for label, _ in classifier.predict([text[row["id"]]], k=3)[0]]
    assert sum(manifest["labels"].values()) == sum(manifest["scores"]) == 3 * 32
    assert json.loads(Path(folder, "_SUCCESS").read_text())["files"] == manifest["files"]
    assert "2026-11-23" in Path(folder, "report.html").read_text()
    counts = pq.read_table(join(folder, "label-counts.parquet")).to_pylist()
    assert {row["label"]: row["documents"] for row in counts if row["documents"]} == manifest["labels"]
    assert not Path(folder, "_work").exists()

    # again: nothing to do; something else: refused; a folder without _SUCCESS: made anew; with --overwrite: replaced
    before = contents(folder)
    assert tag(tmp_path / "in.jsonl", **again) == folder
    with pytest.raises(ConfigError, match="another run"):
        tag(tmp_path / "in.jsonl", min_score=0.5)
    assert contents(folder) == before
    Path(folder, "_SUCCESS").unlink()
    run = manifest["run"]
    tags = Path(tags_folder(folder))
    for half in (tags / f"part-{run}-00007.parquet", Path(folder, f"rejects/.part-{run}-00000.parquet.{'0' * 32}")):
        half.write_bytes(b"PAR1 half a file")
    tag(tmp_path / "in.jsonl", **again)
    assert sorted(path.name for path in tags.iterdir()) == manifest_of(folder)["files"]
    assert not list(Path(folder).glob("rejects/.part-*"))
    tag(tmp_path / "in.jsonl", "--overwrite", min_score=0.5, **again)
    scores = read_night(folder)[0]["scores"].to_pylist()
    assert min(score for row in scores for score in row) >= 0.5
    assert [len(list(place.rglob("*.parquet"))) for place in (tags, Path(folder, "rejects"))] == [1, 1]


def test_labels_below_their_threshold_are_left_out(
    tag: Callable[..., str], trained: Path, bundles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"{n}", "text": f"a {COLOURS[n % 3]} {KINDS[n % 4]}"} for n in range(24)]
    given = {"k": 8, "commit_rows": 10}
    where = write(tmp_path / "in.parquet", rows)
    with pytest.raises(ConfigError, match=r"min_precision needs a calibrated bundle: .*/other; found .*validation.calibrate"):
        tag(where, bundle=bundles[1], min_precision=0.5, **given)
    assert not (tmp_path / "out").exists()
    every, few = tag(where, **given), tag(where, date="2026-11-24", min_precision=0.5, previous="last", **given)
    manifest = manifest_of(few)
    assert manifest["calibrated"] and manifest["min_precision"] == 0.5 and manifest["reused"] == 0
    members = Members.read(str(trained / "bundle"))
    labels = members.fetch()[0]["label"].to_pylist()
    least = dict(zip(labels, members.thresholds(0.5).tolist(), strict=True))
    n_all = n_kept = 0
    for row, kept in zip(read_night(every)[0].to_pylist(), read_night(few)[0].to_pylist(), strict=True):
        tags = list(zip(row["labels"], row["scores"], strict=True))
        assert kept["labels"] == [label for label, score in tags if score >= least[label]]
        n_all, n_kept = n_all + len(tags), n_kept + len(kept["labels"])
    assert 24 <= n_kept < n_all
    capsys.readouterr()
    none = manifest_of(tag(where, date="2026-11-25", min_precision=0.999, **given))
    assert none["labels_never_tagged"] == len(labels) and none["untagged"] == none["tagged"] == 24
    said = capsys.readouterr().out
    assert f"warning: {len(labels)} of {len(labels)} labels are never assigned" in said and "untagged 24" in said
    with pytest.raises(ConfigError, match="invalid value of min_precision"):
        tag(where, min_precision=2)


def test_a_night_says_that_its_scores_were_calibrated_by_another_arithmetic(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: calibration is fitted by one arithmetic and applied to scores of another, without a word."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    warning = "scores are computed by cpu bfloat16 and were calibrated by cpu float32"
    same, other = tag(catalogue), tag(catalogue, model__precision="bfloat16", date="2026-11-24")
    assert manifest_of(same)["calibrated_by"] == manifest_of(other)["calibrated_by"] == ["cpu float32"]
    assert capsys.readouterr().out.count(f"warning: {warning}") == 1
    assert warning not in Path(same, "report.html").read_text()
    assert warning in Path(other, "report.html").read_text()


def test_the_drivers_cpu_settles_what_auto_is_for_each_bundle(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: one setting, read anew in every process. Words alone are in float32, and calibrated so, beside a transformer."""
    cpu = "xmc_ray.model.precision.cpu_has_bfloat16"
    documents = pq.read_table(fruit / "train.parquet").slice(0, 64).to_pydict()
    for name, layers, width in (("words", 0, 8), ("transformer", 1, 0)):
        monkeypatch.setattr(cpu, lambda: True)
        config = FitConfig(
            encoder=EncoderConfig(name=str(tiny_encoder), layers=layers, feature_layers=1),
            lexical=LexicalConfig(width=width, columns=512),
            loop=LoopConfig(epochs=1),
        )
        classifier = XMCClassifier.fit(documents["text"], documents["labels"], config=config)
        classifier.calibrate(documents["text"], documents["labels"]).save(tmp_path / name)
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    bundles = json.dumps([str(tmp_path / "words"), str(tmp_path / "transformer")])

    def night(day: int) -> dict[str, Any]:
        arguments = f"--documents.uri={catalogue}", f"--bundle={bundles}", f"--output={tmp_path}", "--previous=last"
        return manifest_of(job.tag(command.parse(TagConfig, [*arguments, f"--date=2026-11-{day}"]), InProcess()))

    def on_another_machine(*arguments: Any) -> Any:
        monkeypatch.setattr(cpu, lambda: False)
        return Predictor(*arguments)

    monkeypatch.setattr(job, "load_predictor", on_another_machine)
    first = night(22)  # the actor's CPU has no bfloat16, and yet it does as the driver says
    assert first["calibrated_by"] == ["cpu float32", "cpu bfloat16"] and first["arithmetic"] == "cpu bfloat16, cpu float32"
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert all("no bfloat16 instructions" in line for line in warnings)  # said where this test's own CPU has none
    second = night(23)
    assert second["arithmetic"] == "cpu float32" and second["reused"] == 0
    said = capsys.readouterr().out
    assert "nothing is reused: the night before had another arithmetic" in said
    assert said.count("warning: scores are computed by cpu float32 and were calibrated by cpu bfloat16: ") == 1


def test_a_bundle_that_is_swapped_meanwhile_ends_the_night(
    tag: Callable[..., str], trained: Path, bundles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors that start after the plan was kept would else tag with whatever model lies there by then."""
    here = tmp_path / "bundle"
    shutil.copytree(trained / "bundle", here)
    run_pieces = InProcess.run_pieces

    def swap_before(self: Any, *arguments: Any) -> Any:
        shutil.rmtree(here)
        shutil.copytree(bundles[1], here)
        return run_pieces(self, *arguments)

    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "run_pieces", swap_before)
        with pytest.raises(ModelError, match=r"has been replaced by another: .*; put the bundle back"):
            tag(catalogue, bundle=here)
    assert not (tmp_path / "out" / "_nights" / "dt=2026-11-23" / "_SUCCESS").exists()
    shutil.rmtree(here)
    shutil.copytree(trained / "bundle", here)
    assert len(read_night(tag(catalogue, bundle=here))[0]) == 10


def test_tags_of_unchanged_documents_are_reused(tag: Callable[..., str], bundles: list[str], tmp_path: Path) -> None:
    rows = [document(n) for n in range(200)]
    catalogue = write(tmp_path / "in" / "a.parquet", rows)
    first = tag(tmp_path / "in", "--previous=last", date="2026-11-22", target_bytes=1000, commit_rows=60)
    assert len(manifest_of(first)["files"]) > 2 and manifest_of(first)["reused"] == 0
    rows[7] |= {"text": "a yellow grape"}
    rows[150] |= {"text": None}  # type: ignore[dict-item]
    rows = [*rows[::-1][:190], {"id": "new", "text": "a green pear"}, rows[100]]
    write(catalogue, rows)
    second = tag(tmp_path / "in", "--previous=last", max_reject_share=0.1)
    manifest = manifest_of(second)
    # 190 of the old ones are left: d7 is not among them, d150 has lost its text; d100 comes twice
    assert [manifest[name] for name in ("in", "tagged", "reused", "rejected")] == [192, 1, 189, 2]
    assert manifest["previous"] == first
    tags, _ = read_night(second)
    old = {row["id"]: row for row in read_night(first)[0].to_pylist()}
    for row in tags.to_pylist():
        assert row["id"] == "new" or row == old[row["id"]]
    assert Counter(tags["id"].to_pylist()) == Counter({row["id"] for row in rows} - {"d150"})
    fresh = read_night(tag(tmp_path / "in", output=tmp_path / "fresh", max_reject_share=0.1))[0]
    assert {row["id"]: row["labels"] for row in fresh.to_pylist()} == {row["id"]: row["labels"] for row in tags.to_pylist()}
    assert sum(manifest["labels"].values()) == sum(
        manifest_of(str(tmp_path / "fresh" / "_nights" / "dt=2026-11-23"))["labels"].values()
    )

    other = tag(tmp_path / "in", f"--previous={second}", bundle=bundles[1], output=tmp_path / "other", max_reject_share=0.1)
    assert manifest_of(other)["reused"] == 0 and manifest_of(other)["previous"] is None
    with pytest.raises(DataError, match=r"not a finished night.*nowhere"):
        tag(tmp_path / "in", "--previous=/nowhere", date="2026-11-24")


@pytest.mark.parametrize("name", ["release", "arithmetic"])
def test_tags_of_another_release_or_arithmetic_are_not_reused(
    name: str, tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kind: a night's identity holds to the end. Log, manifest and report say so."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(20)])
    first = Path(tag(catalogue, date="2026-11-22"))
    manifest = manifest_of(str(first))
    assert [manifest[name] for name in ("release", "arithmetic")] == [__version__, "cpu float32"]
    (first / "manifest.json").write_text(json.dumps(manifest | {name: "another"}))
    capsys.readouterr()
    second = tag(catalogue, previous="last")
    reason = f"nothing is reused: the night before had another {name}: {first}"
    assert reason in capsys.readouterr().out and reason in Path(second, "report.html").read_text()
    found = manifest_of(second)
    assert [found[name] for name in ("tagged", "reused", "previous", "not_reused")] == [20, 0, None, reason]


def test_a_precision_or_device_is_named_when_it_is_not_that_of_the_unfinished_night(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind: a night's identity holds to the end. A pool may change when a night resumes, but not what computes its scores."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(20)])
    monkeypatch.setattr(InProcess, "run_pieces", lambda *_: iter(()))
    with pytest.raises(DataError, match="rows were lost"):
        tag(catalogue)
    with pytest.raises(ConfigError, match="found arithmetic cpu float32 instead of cuda bfloat16; go on with the release and"):
        tag(catalogue, "--pool.gpu=true")
    with pytest.raises(ConfigError, match=r"found model\.precision = 'auto' instead of 'bfloat16'"):
        tag(catalogue, "--model.precision=bfloat16")


def test_memory_goes_by_the_data_and_not_by_a_setting(tag: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    """Kind: memory. As many tags as there are labels, pieces no larger than the input, no more threads than are useful."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(50)])
    huge = {"k": 10**9, "commit_rows": 10**9, "target_bytes": 10**15, "pool__max": 10**9}
    tags, _ = read_night(tag(catalogue, **huge))
    labels = Members.read(str(trained / "bundle")).fetch()[0]
    assert len(tags) == 50 and max(map(len, tags["labels"].to_pylist())) <= len(labels)
    all_labels, _ = read_night(tag(catalogue, output=tmp_path / "all", k=len(labels)))
    assert tags["labels"].to_pylist() == all_labels["labels"].to_pylist()
    classifier = XMCClassifier.load(str(trained / "bundle"))
    assert classifier.predict(["a red apple"], k=10**9) == classifier.predict(["a red apple"], k=len(labels))


def test_many_tags_make_small_pieces(tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: memory. A piece is a matrix of its rows and k."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(50)])
    monkeypatch.setattr(job, "_PIECE_TAGS", 20)
    rows, write_piece = [], PieceWriter.__call__
    monkeypatch.setattr(PieceWriter, "__call__", lambda self, n, table: rows.append(len(table)) or write_piece(self, n, table))
    assert len(read_night(tag(catalogue, k=5))[0]) == sum(rows) == 50 and max(rows) <= 4


@pytest.mark.usefixtures("ray_session")
def test_a_bundle_has_to_pass_the_gate(
    tag: Callable[..., str], fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is evaluated on Ray for the first gate; the others have the same metrics."""
    metrics: list[dict[str, Any]] = []

    def evaluate_once(*arguments: Any, **named: Any) -> dict[str, Any]:
        if not metrics:
            metrics.append(evaluate_bundle(*arguments, **named))
        return metrics[0]

    monkeypatch.setattr(evaluate, "evaluate_bundle", evaluate_once)
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    gate = f"--gate.documents={json.dumps({'uri': str(fruit / 'test.parquet')})}"
    with pytest.raises(ModelError, match=r"does not pass the gate.*found P@5 0\.\d+; expected at least 0\.99"):
        tag(catalogue, gate, '--gate.at_least={"P@1": 0.1, "P@5": 0.99}')
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no such metric"):
        tag(catalogue, gate, '--gate.at_least={"Q@1": 0.1}')
    with pytest.raises(ConfigError, match="require each other"):
        tag(catalogue, gate)
    assert Path(tag(catalogue, gate, '--gate.at_least={"P@1": 0.8}'), "_SUCCESS").exists()


def test_an_empty_catalogue_is_an_error(tag: Callable[..., str], tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="no documents"):
        tag(tmp_path / "in.parquet")


def test_an_ensemble(tag: Callable[..., str], bundles: list[str], tmp_path: Path) -> None:
    texts = {f"{n}": f"a {COLOURS[n % 3]} {KINDS[n % 4]}" for n in range(20)}
    texts["long"] = "red apple " * 10  # for one of the two models
    write(tmp_path / "in.parquet", [{"id": number, "text": text} for number, text in [*texts.items(), ("null", None)]])
    (tmp_path / "tag.toml").write_text(f"bundle = {json.dumps(bundles)}\n")
    settings = [f"--config={tmp_path / 'tag.toml'}", f"--documents.uri={tmp_path / 'in.parquet'}", "--date=2026-11-23"]
    settings += [f"--output={tmp_path / 'out'}", "--k=2", "--pool.max=1", "--pool.threads=1", "--max_reject_share=0.1"]
    folder = job.tag(command.parse(TagConfig, settings), InProcess())
    tags, manifest = read_night(folder)[0], manifest_of(folder)
    assert [manifest[name] for name in ("in", "tagged", "rejected", "truncated")] == [22, 21, 1, 1]
    assert manifest["bundle"] == Members.read(bundles).fingerprint and set(tags["model"].to_pylist()) == {manifest["bundle"]}
    expected = dict(zip(texts, XMCClassifier.load(bundles).predict(list(texts.values()), k=2), strict=True))
    for row in tags.to_pylist():
        assert row["labels"] == [label for label, _ in expected[row["id"]]]
        assert row["scores"] == pytest.approx([score for _, score in expected[row["id"]]], rel=1e-4)
    named = {label: name for row in tags.to_pylist() for label, name in zip(row["labels"], row["names"], strict=True)}
    assert named["fruit"] == "FRUIT"  # the second bundle has no names

    before = contents(folder)
    for others in (bundles[::-1], bundles[:1], bundles[0]):
        other = f"--bundle={others if isinstance(others, str) else json.dumps(others)}"
        with pytest.raises(ConfigError, match="another run"):
            job.tag(command.parse(TagConfig, [*settings, other]), InProcess())
    with pytest.raises(ConfigError, match="no bundle is given"):
        tag(tmp_path / "in.parquet", "--bundle=[]")
    assert contents(folder) == before


def test_a_half_written_bundle_is_refused(tag: Callable[..., str], fruit: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "bundle", tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        tag(fruit / "test.parquet", bundle=tmp_path / "bundle")
    assert not (tmp_path / "out").exists()


BAD = {
    "k": (["--k=0"], "invalid value of k; found 0; expected at least 1"),
    "share": (["--max_reject_share=1.5"], "invalid value of max_reject_share"),
    "commit_rows": (["--commit_rows=1"], "invalid value of commit_rows; found 1; expected at least 2"),
    "pool": (["--pool.min=2"], "pool.max is below pool.min"),
    "cpus": (["--pool.cpus=0"], "invalid value of pool.cpus; found 0"),
    "date": (["--date=tomorrow"], "invalid value of date: not a day; found 'tomorrow'; expected YYYY-MM-DD or dt=YYYY-MM-DD"),
    "a date that sorts elsewhere": (["--date=20261123"], "invalid value of date"),
    "column": (['--documents.text=["words"]'], "no column 'words'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_clear_line(case: str, tag: Callable[..., str], fruit: Path, tmp_path: Path) -> None:
    further, message = BAD[case]
    with pytest.raises(XmcError, match=message):
        tag(fruit / "test.parquet", *further)
    assert not (tmp_path / "out").exists()

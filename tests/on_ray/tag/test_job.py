"""The tagging job on Ray, called in process with a tiny model: every id once, whatever the input holds."""

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import COLOURS, KINDS, document, read_night
from seaweed import S3

from xmc_ray import command, storage
from xmc_ray.bundle.ensemble import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.errors import ConfigError, DataError, ModelError, XmcError
from xmc_ray.on_ray.predictor import PoolConfig
from xmc_ray.on_ray.tag import job, output
from xmc_ray.storage import folders
from xmc_ray.storage.files import join

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def tag(trained: Path, tmp_path: Path) -> Callable[..., str]:
    """Tags a catalogue with the trained model into ``<tmp_path>/out/dt=2026-11-23``, unless told otherwise."""

    def run(documents: object, *further: str, **settings: Any) -> str:
        given = {"documents.uri": documents, "bundle": trained / "bundle", "output": tmp_path / "out", "date": "2026-11-23"}
        given |= {"k": 3, "pool.max": 1, "pool.threads": 1} | {
            name.replace("__", "."): value for name, value in settings.items()
        }
        arguments = [f"--{name}={value}" for name, value in given.items()] + list(further)
        return job.run(command.parse(job.TagConfig, arguments))

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def manifest_of(folder: str) -> dict[str, Any]:
    return dict(storage.read_json(join(folder, "manifest.json")))


def contents(folder: object) -> dict[str, int]:
    """All files and when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in Path(str(folder)).rglob("*") if path.is_file()}


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
    Path(folder, "part-half.parquet").write_bytes(b"PAR1 half a file")
    tag(tmp_path / "in.jsonl", **again)
    assert sorted(path.name for path in Path(folder).glob("part-*")) == manifest_of(folder)["files"]
    tag(tmp_path / "in.jsonl", "--overwrite", min_score=0.5, **again)
    scores = read_night(folder)[0]["scores"].to_pylist()
    assert min(score for row in scores for score in row) >= 0.5
    assert len(list(Path(folder).rglob("part-*.parquet"))) == 2


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
    labels = pq.read_table(members.fetch()[0], columns=["label"])["label"].to_pylist()
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
    assert f"warning: {len(labels)} of {len(labels)} labels are never a tag" in said and "untagged 24" in said
    with pytest.raises(ConfigError, match="min_precision does not fit"):
        tag(where, min_precision=2)


def test_what_cannot_be_read_is_rejected_with_its_place(tag: Callable[..., str], tmp_path: Path) -> None:
    """Files cut short, of another schema, of garbage; bytes that are no text; a text of 100 MB; ids that come twice."""
    folder = tmp_path / "in"
    good = [document(n) for n in range(40)]
    write(folder / "a.parquet", [*good[:20], {"id": "d5", "text": "a red plum"}, {"id": "huge", "text": "a" * 100_000_000}])
    write(folder / "b.parquet", [{"id": f"x{n}", "title": "none of ours"} for n in range(3)])
    (folder / "c.parquet").write_bytes((folder / "a.parquet").read_bytes()[:300])
    (folder / "d.parquet").write_bytes(b"")
    latin = pa.array([b"a", b"\xe4", None]).view(pa.string())
    pq.write_table(pa.table({"id": latin, "text": ["a red apple"] * 3}), folder / "e.parquet")
    write(folder / "f.parquet", good[20:])
    damaged = bytearray((folder / "f.parquet").read_bytes())
    damaged[4:40] = bytes(36)  # the first row group's first page
    (folder / "g.parquet").write_bytes(bytes(damaged))
    write(folder / "h.parquet", [{"id": "d0", "text": None}, {"id": "d5", "text": "again"}])
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), folder / "i.parquet")

    with pytest.raises(DataError, match=r"too many documents are rejected: \S+/_work/rejects; found .*expected at most 1\.0%"):
        tag(folder)
    made = tmp_path / "out" / "dt=2026-11-23"
    assert not (made / "_SUCCESS").exists() and list((made / "_work" / "rejects").glob("*.parquet"))
    tags, rejects = read_night(tag(folder, max_reject_share=1))
    assert Counter(tags["id"].to_pylist()) == Counter([*(row["id"] for row in good), "a"])
    told = [(Path(row["file"]).name, row["row"], row["id"], row["reason"]) for row in rejects.to_pylist()]
    a = str(folder / "a.parquet")
    assert told[:2] == [
        ("a.parquet", 20, "d5", f"duplicate id, first at {a} row 5"),
        ("a.parquet", 21, "huge", "text is longer than 1,048,576 bytes"),
    ]
    assert told[2:5] == [("b.parquet", n, None, "no column 'text'; found id, title") for n in range(3)]
    assert [row[:3] for row in told[5:7]] == [("c.parquet", 0, None), ("d.parquet", 0, None)]
    assert all(row[3].startswith("cannot be read: ") for row in told[5:7])
    assert told[7:9] == [("e.parquet", 1, None, "id is not UTF-8"), ("e.parquet", 2, None, "id is null")]
    of_g = [row for row in told if row[0] == "g.parquet"]
    assert len(of_g) == 20 and [row[1] for row in of_g] == list(range(20))
    assert all(row[3].startswith("cannot be read: ") for row in of_g[:7])
    f = str(folder / "f.parquet")
    assert [row[3] for row in of_g[7:]] == [f"duplicate id, first at {f} row {n}" for n in range(7, 20)]
    assert told[-2:] == [("h.parquet", 0, "d0", "text is null"), ("h.parquet", 1, "d5", f"duplicate id, first at {a} row 5")]
    manifest = manifest_of(str(made))
    assert manifest["in"] == manifest["tagged"] + manifest["rejected"] == 41 + len(told)
    assert manifest["reasons"]["duplicate id"] == 15


def test_ids_of_file_and_row(tag: Callable[..., str], tmp_path: Path) -> None:
    lines = [json.dumps({"text": document(n)["text"]}) for n in range(6)]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text("\n\n".join(lines[:3]))
    (tmp_path / "in" / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[3:5], "{", lines[5]]).encode()))
    tags, rejects = read_night(tag(tmp_path / "in", "--documents.id=null", max_reject_share=0.2, pool__max=0))
    assert tags["id"].to_pylist() == [
        "a.jsonl:0",
        "a.jsonl:1",
        "a.jsonl:2",
        "sub/b.jsonl.gz:0",
        "sub/b.jsonl.gz:1",
        "sub/b.jsonl.gz:3",
    ]
    assert rejects.select(["row", "id"]).to_pylist() == [{"row": 2, "id": "sub/b.jsonl.gz:2"}]


def test_files_that_go_or_change_after_they_were_listed(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("a", 0), ("b", 10), ("c", 20)):
        write(tmp_path / "in" / f"{name}.parquet", [document(n) for n in range(first, first + 10)])
    keep_plan = output.Night.keep_plan

    def meddle(self: Any, plan: Any) -> None:
        keep_plan(self, plan)
        (tmp_path / "in" / "a.parquet").unlink()
        write(tmp_path / "in" / "b.parquet", [document(n) for n in range(50, 55)])

    monkeypatch.setattr(output.Night, "keep_plan", meddle)
    tags, rejects = read_night(tag(tmp_path / "in", max_reject_share=1))
    assert tags["id"].to_pylist() == [f"d{n}" for n in range(20, 30)]
    told = Counter((Path(row["file"]).name, row["reason"]) for row in rejects.to_pylist())
    assert told == {
        ("a.parquet", "the file has disappeared"): 10,
        ("b.parquet", "the file has changed since it was listed"): 10,
    }


def test_a_night_that_replaces_another_leaves_it_until_the_end(tag: Callable[..., str], tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(20)])
    folder = tag(catalogue)
    first, before = read_night(folder), contents(folder)
    write(catalogue, [document(n) for n in range(30)] + [{"id": "x", "text": None}])
    with pytest.raises(ConfigError, match=r"another run.*other input.*--overwrite"):
        tag(catalogue)
    with pytest.raises(DataError, match="too many documents are rejected"):
        tag(catalogue, "--overwrite")
    assert contents(folder).items() >= before.items() and read_night(folder)[0].equals(first[0])
    with pytest.raises(ConfigError, match="another run"):
        tag(catalogue, min_score=0.5)
    tag(catalogue, "--overwrite", max_reject_share=0.1)
    assert len(read_night(folder)[0]) == 30
    assert not set(before) & {str(path) for path in Path(folder).glob("part-*")}


def test_what_has_not_changed_is_taken_over(tag: Callable[..., str], bundles: list[str], tmp_path: Path) -> None:
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
    assert sum(manifest["labels"].values()) == sum(manifest_of(str(tmp_path / "fresh" / "dt=2026-11-23"))["labels"].values())

    other = tag(tmp_path / "in", f"--previous={second}", bundle=bundles[1], output=tmp_path / "other", max_reject_share=0.1)
    assert manifest_of(other)["reused"] == 0 and manifest_of(other)["previous"] is None
    with pytest.raises(DataError, match=r"not a finished night.*nowhere"):
        tag(tmp_path / "in", "--previous=/nowhere", date="2026-11-24")


def test_a_bundle_has_to_pass_the_gate(tag: Callable[..., str], fruit: Path, tmp_path: Path) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    gate = f"--gate.documents={json.dumps({'uri': str(fruit / 'test.parquet')})}"
    with pytest.raises(ModelError, match=r"does not pass the gate.*found P@5 0\.\d+; expected at least 0\.99"):
        tag(catalogue, gate, '--gate.at_least={"P@1": 0.1, "P@5": 0.99}')
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no such metric"):
        tag(catalogue, gate, '--gate.at_least={"Q@1": 0.1}')
    with pytest.raises(ConfigError, match="go together"):
        tag(catalogue, gate)
    assert Path(tag(catalogue, gate, '--gate.at_least={"P@1": 0.8}'), "_SUCCESS").exists()


def test_labels_that_have_moved_are_told_or_fail_the_night(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = write(tmp_path / "in.parquet", [{"id": f"{n}", "text": "a red apple"} for n in range(1000)])
    with pytest.raises(DataError, match=r"moved too far from those of training; found PSI .*apple"):
        tag(catalogue, "--drift.fail=0.5")
    folder = tag(catalogue)
    assert "warning: the labels have moved from those of training: PSI" in capsys.readouterr().out
    assert manifest_of(folder)["drift"]["training"] > 0.5


def test_a_machine_of_its_own_is_kept_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Ray of `ray_session` has six CPUs, whatever the machine has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = {1: (1, 1), 2: (2, 1), 3: (2, 1), 4: (2, 2)}
    for count, expected in cores.items():
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=count: range(count))
        pool = PoolConfig().settled()
        assert (pool.max, pool.threads_each) == expected
    assert PoolConfig(min=3).settled().max == 3 and PoolConfig(max=1).settled().max == 1
    assert PoolConfig(gpu=True).settled().max == 1, "none is there, which is told later"
    assert PoolConfig(threads=4).settled().max == 1
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert PoolConfig().settled().max == 1


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
    folder = job.run(command.parse(job.TagConfig, settings))
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
            job.run(command.parse(job.TagConfig, [*settings, other]))
    with pytest.raises(ConfigError, match="no bundle is given"):
        tag(tmp_path / "in.parquet", "--bundle=[]")
    assert contents(folder) == before


def test_on_object_storage(tag: Callable[..., str], trained: Path, s3: S3, tmp_path: Path) -> None:
    """Ten thousand objects are listed, of which some are the catalogue; a night, the next one, and that one again."""
    folders.upload(trained / "bundle", s3.uri("bundles/fruit"), last="config.json")
    filesystem, path = storage.arrow_filesystem(s3.uri("catalogue"))

    def put(number: int) -> None:
        folder = f"{number % 7}" if number < 200 else "_others"
        with filesystem.open_output_stream(f"{path}/{folder}/{number:05}.jsonl") as stream:
            stream.write("".join(json.dumps(document(n)) + "\n" for n in range(3 * number, 3 * number + 3)).encode())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(10_000)))
    settings = {"bundle": s3.uri("bundles/fruit"), "output": s3.uri("tags")}
    first = tag(s3.uri("catalogue"), date="2026-01-02", **settings)
    assert manifest_of(first)["tagged"] == manifest_of(first)["in"] == 3 * len(manifest_of(first)["input"]) == 600
    assert sorted(read_night(first)[0]["id"].to_pylist()) == sorted(f"d{n}" for n in range(600))
    storage.write_bytes(s3.uri("catalogue/0/00000.jsonl"), json.dumps({"id": "d0", "text": "a green plum"}).encode())
    second = tag(s3.uri("catalogue"), "--previous=last", date="2026-01-03", **settings)
    assert [manifest_of(second)[name] for name in ("tagged", "reused")] == [1, 597]
    assert tag(s3.uri("catalogue"), date="2026-01-03", previous="last", **settings) == second
    replaced = tag(s3.uri("catalogue"), "--overwrite", date="2026-01-03", **settings)
    names = {file.uri.rpartition("/")[2] for file in storage.all_files(replaced)}
    assert names == {*manifest_of(replaced)["files"], *OTHERS} and manifest_of(replaced)["tagged"] == 598


OTHERS = {"manifest.json", "report.html", "run.json", "label-counts.parquet", "_SUCCESS"}


def test_a_bucket_that_may_not_be_written_and_wrong_keys(
    tag: Callable[..., str], s3: S3, fruit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(s3.uri("readable/test.parquet"), (fruit / "test.parquet").read_bytes())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret_key)
    with pytest.raises(ConfigError, match=r"cannot be read or written: \S+/_driver\.json.*check AWS_ACCESS_KEY_ID") as refused:
        tag(s3.uri("readable"), output=s3.uri("forbidden"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(ConfigError, match=r"cannot be read or written.*check AWS_ACCESS_KEY_ID") as wrong:
        tag(s3.uri("readable"))
    for error in (refused, wrong):
        assert not any(secret in str(error.value) for secret in ("not-the-secret", s3.reader_secret_key, s3.secret_key))
        assert "\n" not in str(error.value)


def test_a_foreign_folder_is_left_alone(tag: Callable[..., str], fruit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "dt=2026-11-23"
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    for overwrite in ("false", "true"):
        with pytest.raises(ConfigError, match="something else"):
            tag(fruit / "test.parquet", f"--overwrite={overwrite}")
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_a_half_written_bundle_is_refused(tag: Callable[..., str], fruit: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "bundle", tmp_path / "bundle")
    weights = tmp_path / "bundle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        tag(fruit / "test.parquet", bundle=tmp_path / "bundle")
    assert not (tmp_path / "out").exists()


BAD = {
    "k": (["--k=0"], "k does not fit"),
    "share": (["--max_reject_share=1.5"], "max_reject_share does not fit"),
    "commit_rows": (["--commit_rows=1"], "commit_rows"),
    "pool": (["--pool.min=2"], "pool sizes do not fit"),
    "cpus": (["--pool.cpus=0"], "an actor's share does not fit"),
    "date": (["--date=tomorrow"], "date does not fit"),
    "column": (['--documents.text=["words"]'], "no column 'words'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_clear_line(case: str, tag: Callable[..., str], fruit: Path, tmp_path: Path) -> None:
    further, told = BAD[case]
    with pytest.raises(XmcError, match=told):
        tag(fruit / "test.parquet", *further)
    assert not (tmp_path / "out").exists()


def test_addresses_may_be_spelt_in_several_ways(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept and what is removed at the end goes by address."""
    write(tmp_path / "in" / "a.parquet", [document(n) for n in range(10)])
    monkeypatch.chdir(tmp_path)
    folder = tag(f"file://{tmp_path}/in/", "--documents.id=null", output=f"file://{tmp_path}/out/", date="2026-11-22")
    assert read_night(folder)[0]["id"].to_pylist() == [f"a.parquet:{n}" for n in range(10)]
    again = tag("in", "--documents.id=null", "--previous=last", output="./out")
    assert [manifest_of(again)[name] for name in ("tagged", "reused")] == [0, 10]


def test_pieces_that_are_not_those_of_the_plan_are_no_night(
    tag: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another run has finished the night meanwhile, and tidied up."""
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(40)])
    publish = output.Night.publish

    def meddle(self: Any, *arguments: Any) -> Any:
        (tmp_path / "out" / "dt=2026-11-23" / "_work" / "pieces" / "t000001.parquet").unlink()
        return publish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output.Night, "publish", meddle)
        with pytest.raises(DataError, match=r"not those of the plan.*found \d+ of them and 0 others"):
            tag(catalogue, commit_rows=20)
    assert not (tmp_path / "out" / "dt=2026-11-23" / "_SUCCESS").exists()
    (tmp_path / "out" / "dt=2026-11-23" / "_work" / "pieces" / "t000002.parquet").write_bytes(b"")
    assert len(read_night(tag(catalogue, commit_rows=20))[0]) == 40

"""The benchmarks of quality: predictions as files are scored as they should be, and a finished run is not run again."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality._levers import merged
from benchmarks.quality._quality import (
    PEERS,
    Method,
    collect,
    fresh,
    made_of,
    peers,
    ranking,
    run,
    score,
    stands,
)
from benchmarks.quality._record import FRESH, Benchmark, holding, options, read, unfinished, write
from benchmarks.quality._tables import TOTAL, compared, lacking, margins, page, table
from benchmarks.quality.auto import folder_of, title
from benchmarks.quality.auto import methods as auto_methods
from benchmarks.quality.lift import reordered
from benchmarks.quality.quality import SETS, methods, recipes
from xmc_ray.data.labels import LabelIndex

COUNTER = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[2])
(out.parent / "calls").open("a").write("x")
"""
WRITER = f"""{COUNTER}
(out / "costs.json").write_text(json.dumps({{"train_seconds": 1.0, "predict_seconds": 0.5, "model_bytes": 7}}))
"""


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), unique=True), max_size=5))
def test_ranking_has_the_first_ten_known_labels_in_their_places(rows: list[list[str]]) -> None:
    index = LabelIndex.count([pa.array([["a", "b"], list("bcdefghijklm")])])
    places = {name: place for place, name in enumerate(index.labels.to_pylist())}
    expected = [([places.get(label, -1) for label in row] + [-1] * 10)[:10] for row in rows]
    assert ranking(pa.array(rows, pa.list_(pa.string())), index).tolist() == expected


def write_labels(file: Path, labels: list[list[str]]) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"labels": pa.array(labels, pa.list_(pa.string()))}), file)


def test_score_leaves_out_true_labels_that_training_lacks(tmp_path: Path) -> None:
    write_labels(tmp_path / "train.parquet", [["a", "b"], ["a"], ["c"]])
    write_labels(tmp_path / "test.parquet", [["a", "new"], ["b", "c"], ["new"]])
    write_labels(tmp_path / "out" / "predictions.parquet", [["a", "c"], ["a", "c", "b"], ["a"]])
    result = score(tmp_path, tmp_path / "out")
    assert (result["documents"], result["unlabelled"]) == (3, 1)
    assert result["total"]["P@1"] == 1 / 2
    assert np.isclose(result["total"]["P@3"], (1 + 2) / 6)


def test_a_fresh_split_is_of_the_training_split_alone_without_near_duplicates(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    texts = [f"One, two THREE four. five {row if row % 7 else 0} and {row}" for row in range(2_150)]
    pq.write_table(pa.table({"text": texts, "labels": [["a"]] * len(texts)}), tmp_path / "data" / "train.parquet")
    folder = fresh(tmp_path / "data", tmp_path / "fresh")
    train, test = (pq.read_table(folder / f"{split}.parquet")["text"].to_pylist() for split in ("train", "test"))
    assert train == [text for row, text in enumerate(texts) if row // 100 % 10 != 9]
    assert test == [text for row, text in enumerate(texts) if row // 100 % 10 == 9 and row % 7]


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr("benchmarks.quality._quality.ROOT", tmp_path)
    (tmp_path / "script.py").write_text(WRITER)
    return Method("one", tmp_path / "script.py")


def test_a_finished_run_is_kept_until_its_command_or_script_changes(method: Method, tmp_path: Path) -> None:
    out = tmp_path / "one"
    for extra, calls in ((), "x"), ((), "x"), (("--deeper",), "xx"), (("--deeper",), "xx"):
        assert run(Method(method.name, method.script, extra), tmp_path, out)
        assert (tmp_path / "calls").read_text() == calls
    method.script.write_text(f"{WRITER}# changed\n")
    assert run(Method(method.name, method.script, ("--deeper",)), tmp_path, out)
    assert (tmp_path / "calls").read_text() == "xxx"
    write_labels(tmp_path / "test.parquet", [["another"]])
    assert run(Method(method.name, method.script, ("--deeper",)), tmp_path, out)
    assert (tmp_path / "calls").read_text() == "xxxx"
    kept = json.loads((out / "run.json").read_text())
    assert kept["command"] == ["script.py", "--deeper"] and kept["model_bytes"] == 7 and kept["cpu_seconds"] >= 0


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one file, of which `library` makes its digest."""
    file = tmp_path / "library" / "one.py"
    file.parent.mkdir()
    file.write_text("one = 1\n")
    monkeypatch.setattr("benchmarks.quality._quality.LIBRARY", file.parent)
    return file


@pytest.mark.parametrize(("same", "calls"), [((), "x"), (("library",), "xx"), (("library", "machine"), "xx")])
def test_a_change_of_the_library_counts_where_a_benchmark_says_so(
    method: Method, sources: Path, tmp_path: Path, same: tuple[str, ...], calls: str
) -> None:
    peer = replace(method, name="peer", environment="omikuji")
    before = made_of(method, tmp_path), made_of(peer, tmp_path)
    assert run(method, tmp_path, tmp_path / "one", same=same) and run(method, tmp_path, tmp_path / "one", same=same)
    sources.write_text("one = 2\n")
    assert run(method, tmp_path, tmp_path / "one", same=same)
    assert (tmp_path / "calls").read_text() == calls
    assert stands(before[0], method, tmp_path, same=same) == (not same) and stands(before[1], peer, tmp_path, same=same)


def test_a_run_during_which_the_library_changed_is_none(method: Method, sources: Path, tmp_path: Path) -> None:
    method.script.write_text(f"{WRITER}\npathlib.Path({str(sources)!r}).write_text('one = 3')")
    assert not run(method, tmp_path, tmp_path / "one")
    assert collect(tmp_path, tmp_path, ["one"])["one"]["failure"] == "ran while what it is made of changed"


def test_a_row_of_another_machine_is_not_valid_where_all_must_be_of_one(method: Method, tmp_path: Path) -> None:
    row = made_of(method, tmp_path) | {"machine": "another CPU, 2 cores"}
    runs = {"one": {"costs": row}}
    assert holding(runs, [method], tmp_path, ("library",)) == runs and unfinished(runs, [method], tmp_path, 1.0) == []
    assert holding(runs, [method], tmp_path, ("machine",)) == {}
    assert unfinished(runs, [method], tmp_path, 1.0, ("machine",)) == [method]


def test_cpu_seconds_have_those_of_processes_that_are_too_short_to_be_seen(method: Method, tmp_path: Path) -> None:
    work = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])\n"
    method.script.write_text(f"{work}{WRITER}")
    assert run(method, tmp_path, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "run.json").read_text())["cpu_seconds"] > 0.1


def test_a_title_is_what_comes_before_the_first_full_stop_or_line_break() -> None:
    texts = ["Call. Phillip King. 1967", "a tool\nfor 3.5 things. It", "AMQP 1.0 client", ". nothing before", ""]
    assert title(pa.array(texts)).to_pylist() == ["Call", "a tool", "AMQP 1.0 client", ". nothing before", ""]


def test_a_set_of_titles_has_the_other_columns_and_names_of_its_set(tmp_path: Path) -> None:
    data = tmp_path / "data" / "some"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        rows = {"id": [split], "text": [f"{split}. More"], "labels": pa.array([["a"]])}
        pq.write_table(pa.table(rows), data / f"{split}.parquet")
    pq.write_table(pa.table({"label": ["a"], "name": ["A"]}), data / "labels.parquet")
    folder = folder_of("some-titles", data.parent, tmp_path / "made")
    assert pq.read_table(folder / "test.parquet").to_pylist() == [{"id": "test", "text": "test", "labels": ["a"]}]
    assert (folder / "labels.parquet").exists() and folder_of("some", data.parent, tmp_path / "made") == data


def test_linear_peers_train_a_machine_a_label_where_labels_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.auto.minilm", lambda: "encoder")
    for n_labels, has_svc in (1_000, True), (1_001, False):
        write_labels(tmp_path / "train.parquet", [[str(label)] for label in range(n_labels)])
        ours, *others = auto_methods(tmp_path, 20.0, ["--search=0.3"])
        assert ours.name == "xmc_ray-auto-20" and ours.options == ("--tune-minutes=20", "--search=0.3")
        names = [other.name for other in others]
        assert ("linear-svc" in names) == has_svc and "omikuji-bonsai-df2" in names and "xr-transformer" not in names


def test_a_run_that_does_not_say_what_it_was_made_of_is_repeated(method: Method, tmp_path: Path) -> None:
    assert run(method, tmp_path, tmp_path / "one")
    told = json.loads((tmp_path / "one" / "run.json").read_text())
    (tmp_path / "one" / "run.json").write_text(json.dumps({name: told[name] for name in told if name != "source"}))
    assert run(method, tmp_path, tmp_path / "one")
    assert (tmp_path / "calls").read_text() == "xx"


def test_a_comment_in_a_recipe_or_among_releases_makes_no_other_run(method: Method, tmp_path: Path) -> None:
    recipe = Method(method.name, method.script, ("--config=recipe.toml",))
    for text, calls in ("# good\nepochs = 1\n", "x"), ("# better\nepochs = 1\n", "x"), ("# better\nepochs = 2\n", "xx"):
        (tmp_path / "recipe.toml").write_text(text)
        assert run(recipe, tmp_path, tmp_path / "one")
        assert (tmp_path / "calls").read_text() == calls


def test_an_ensemble_is_made_again_when_a_member_is_newer_and_has_its_costs(method: Method, tmp_path: Path) -> None:
    method.script.write_text(WRITER.replace('"model_bytes"', '"cpu_seconds": 100.0, "peak_bytes": 1e15, "model_bytes"'))
    together = Method("all", method.script, members=(method.name,))
    for date, calls in ("2001-01-01", "xx"), ("2001-01-01", "xx"), ("9999-01-01", "xxx"):
        assert run(method, tmp_path, tmp_path / method.name)
        member = tmp_path / method.name / "run.json"
        member.write_text(json.dumps(json.loads(member.read_text()) | {"date": date}))
        assert run(together, tmp_path, tmp_path / together.name) and (tmp_path / "calls").read_text() == calls
    costs = json.loads((tmp_path / together.name / "run.json").read_text())
    assert costs["peak_bytes"] == 1e15 and 100 <= costs["cpu_seconds"] < 200


@pytest.mark.parametrize(
    ("text", "minutes", "failure"),
    [
        ("raise SystemExit(3)", None, "failed with status 3"),
        ("import time; time.sleep(60)", 1e-3, "stopped after 0.001 minutes"),
    ],
)
def test_a_run_that_fails_says_so_and_is_repeated_unless_it_took_too_long(
    method: Method, tmp_path: Path, text: str, minutes: float | None, failure: str
) -> None:
    method.script.write_text(f"{COUNTER}{text}")
    assert not run(method, tmp_path, tmp_path / "one", minutes=minutes)
    found = collect(tmp_path, tmp_path, ["one", "never"])
    assert found["one"]["failure"] == failure and list(found) == ["one"]
    assert not run(method, tmp_path, tmp_path / "one", minutes=minutes)
    assert (tmp_path / "calls").read_text() == ("xx" if minutes is None else "x")
    method.script.write_text(WRITER)
    assert run(method, tmp_path, tmp_path / "one", minutes=minutes or 1)


def test_a_peer_without_an_environment_does_not_end_the_benchmark(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality._quality.interpreter", lambda *_: subprocess.run(["false"], check=True))
    peer = Method("peer", method.script, environment="peer")
    assert not run(peer, tmp_path, tmp_path / "peer")
    assert collect(tmp_path, tmp_path, ["peer"])["peer"]["failure"] == "has no environment"


def result(value: float) -> dict[str, Any]:
    costs = {"train_seconds": 1, "predict_seconds": 2, "cpu_seconds": 3, "model_bytes": 4e6, "peak_bytes": 5e6}
    costs |= {"date": "2026-11-25T12:00:00+00:00", "cores": 2}
    return {"total": dict.fromkeys(TOTAL, value), "bands": {"1": {"P@5": None}}, "costs": costs}


def test_margins_are_those_of_our_ensemble_or_best_recipe_on_the_best_peer() -> None:
    peers_runs = {"c": result(0.25), "d": result(0.625), "e": {"failure": "failed"}}
    points = margins({"xmc_ray-a": result(0.5), "xmc_ray-b": result(0.75), **peers_runs})
    assert points == dict.fromkeys(TOTAL, 12.5)
    points = margins({"xmc_ray-a": result(0.75), "xmc_ray-ensemble-x2": result(0.5), **peers_runs})
    assert points == dict.fromkeys(TOTAL, -12.5)
    assert margins(peers_runs) == {} and margins({"xmc_ray-a": result(0.5)}) == {}


def test_ours_is_compared_with_the_best_peer_of_each_figure() -> None:
    low, high, ours = result(0.25), result(0.75), result(0.5)
    high["total"] |= {"P@3": 0.125}
    high["costs"] |= {"cpu_seconds": 30.0}
    ours["costs"] |= {"peak_bytes": 2.5e6, "cpu_seconds": 6.0}
    lines = compared({"low": low, "high": high, "xmc_ray-a": ours, "late": {"failure": "failed"}}).splitlines()
    assert "| P@1 | 50.00 | 75.00 | high | -25.00 | behind |" in lines
    assert "| P@3 | 50.00 | 25.00 | low | +25.00 | ahead |" in lines
    assert "| CPU s | 6 | 3 | low | 2.00 times | behind |" in lines
    assert "| peak MB | 2 | 5 | low | 0.50 times | ahead |" in lines
    assert compared({"low": low}) == compared({"xmc_ray-a": ours}) == ""


def test_a_verdict_wants_all_runs_but_those_of_peers_that_take_too_long() -> None:
    slow, long = {"failure": "stopped after 1 minutes", "minutes": 1}, result(0.5)
    long["costs"] |= {"train_seconds": 3601}
    runs = {"peer": slow, "xmc_ray-slow": slow, "broken": {"failure": "failed with status 3"}, "xmc_ray-long": long}
    found = lacking({"set": runs | {"good": result(0.5)}}, {"set": [*runs, "good", "lost"]})
    assert found == [
        "set: xmc_ray-slow stopped after 1 minutes",
        "set: broken failed with status 3",
        "set: xmc_ray-long trained for 3601 s",
        "set: lost is missing",
    ]


def test_table_has_the_best_first_and_as_many_cells_a_row() -> None:
    runs = {"late": {"failure": "stopped after 90 minutes"}, "low": result(0.25), "xmc_ray-high": result(0.5)}
    lines = table(runs).splitlines()
    assert lines[2].startswith("| **xmc_ray-high** | 50.00") and lines[3].startswith("| low | 25.00")
    assert lines[4].startswith("| late stopped after 90 minutes | –")
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_says_when_on_what_and_against_which_releases() -> None:
    text = page({"nothing": {}, "something": {"one": result(0.5)}})
    assert "Nothing is finished." in text and "not looked at" not in text
    assert FRESH in page({}, FRESH)
    assert "Made from 2026-11-25. Commits: not recorded. Peers: libmultilabel 0" in text and "libpecos 1" in text


def test_the_page_says_if_rows_are_of_several_machines_or_states_of_the_library() -> None:
    old, new, peer = result(0.5), result(0.5), result(0.5)
    new["costs"] |= {"library": "abc", "machine": "a CPU, 2 cores"}
    peer["costs"] |= {"library": None, "machine": "a CPU, 2 cores"}
    same = page({"set": {"xmc_ray-a": new, "peer": peer}})
    assert "Machine: a CPU, 2 cores.\n" in same and "State of the library: abc.\n" in same
    mixed = page({"set": {"xmc_ray-a": new, "xmc_ray-b": old}})
    assert "Machine: a CPU, 2 cores; not recorded, 2 cores. Rows of more than one machine are not comparable" in mixed
    assert "State of the library: abc; not recorded. Rows of more than one state of the library" in mixed


@pytest.fixture
def row(method: Method, tmp_path: Path) -> dict[str, Any]:
    """A row of the record, of ``method`` as it is."""
    assert run(method, tmp_path, tmp_path / "one")
    return result(0.5) | {"costs": json.loads((tmp_path / "one" / "run.json").read_text())}


def test_a_record_keeps_rows_until_what_they_are_made_of_changes(method: Method, row: dict[str, Any], tmp_path: Path) -> None:
    late = {name: row["costs"][name] for name in ("command", "source")} | {"failure": "stopped after 2 minutes", "minutes": 2.0}
    write(tmp_path / "quality.md", {"set": {"one": row, "late": late}})
    runs = read(tmp_path / "quality.jsonl")["set"]
    assert runs == {"one": row, "late": late} and read(tmp_path / "none.jsonl") == {}
    queue = [method, replace(method, name="late")]
    assert holding(runs, queue, tmp_path) == runs and holding(runs, [], tmp_path) == {}
    assert unfinished(runs, queue, tmp_path, 2.0) == [] and unfinished(runs, queue, tmp_path, 3.0) == queue[1:]
    assert unfinished({}, queue, tmp_path, 2.0) == queue
    method.script.write_text(f"{WRITER}# changed\n")
    assert holding(runs, queue, tmp_path) == {} and unfinished(runs, queue, tmp_path, 2.0) == queue


def test_a_record_that_breaks_off_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "quality.md", {"set": {"one": result(0.5)}})

    def half(file: Path, text: str) -> None:
        file.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="full"):
        write(tmp_path / "quality.md", {"set": {"one": result(0.25)}})
    assert read(tmp_path / "quality.jsonl") == {"set": {"one": result(0.5)}}


def test_an_ensemble_that_is_to_be_run_wants_its_members_models(method: Method, row: dict[str, Any], tmp_path: Path) -> None:
    other, together = replace(method, name="other"), replace(method, name="all", members=("one",))
    runs, queue = {"one": row, "other": row, "all": row}, [method, other, together]
    assert unfinished(runs, queue, tmp_path, 1.0) == []
    newer = row | {"costs": row["costs"] | {"date": "9999-01-01"}}
    assert unfinished(runs | {"one": newer}, queue, tmp_path, 1.0) == [method, together]
    assert unfinished({"one": row, "other": row}, queue, tmp_path, 1.0) == [method, together]


def test_every_peer_has_a_script_and_pinned_requirements() -> None:
    for peer in peers("encoder"):
        assert peer.script.exists()
        lines = (PEERS / f"{peer.environment}.txt").read_text().splitlines()
        assert all(line.startswith("#") or "==" in line for line in lines)


def test_a_recipe_is_a_row_a_seed_and_several_make_an_ensemble() -> None:
    (one,) = recipes("unheard-of", [1], ["--loop.epochs=3"])
    assert one.name == "xmc_ray-small-cpu-1"
    assert one.options == ("--config=xmc_ray/recipes/small-cpu.toml", "--seed=1", "--loop.epochs=3")
    *single, together = recipes("debian-deps", [1, 2], [])
    assert [method.name for method in single] == [f"xmc_ray-{name}-{seed}" for name in ("recipe", "joint") for seed in (1, 2)]
    assert together.members == tuple(method.name for method in single) and together.options == ("--members", *together.members)


@pytest.mark.parametrize("set_", SETS)
def test_names_of_methods_are_distinct(set_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.quality.minilm", lambda: "encoder")
    names = [method.name for method in methods(set_, [1, 2], [])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scores", [[0.6, 0.5, 0.1, 0.0], [0.4, 0.0, -2.2, -9.0]], ids=["chances", "margins"])
def test_a_lift_from_outside_reorders_by_odds_over_propensity(scores: list[float]) -> None:
    listed = np.array([scores], np.float32), np.array([[0, 1, 2, -1]])
    propensity = np.array([1.0, 0.5, 0.5])  # the odds of the two rarer labels double: 1.5, 2 and a fifth
    assert reordered(listed, propensity, 0.0).tolist() == [[0, 1, 2, -1]]
    assert reordered(listed, propensity, 1.0).tolist() == [[1, 0, 2, -1]]


def test_of_a_label_and_its_copy_the_higher_score_counts() -> None:
    listed = np.array([[0.9, 0.8, 0.7, 0.6, 0.0]], np.float32), np.array([[1, 4, 6, 0, -1]])
    scores, ids = merged(listed, 3)
    assert ids.tolist() == [[1, 0, -1, -1, -1]] and np.allclose(scores, [[0.9, 0.7, 0, 0, 0]])
    scores, ids = merged(listed, 10)
    assert ids.tolist() == listed[1].tolist() and scores.tolist() == listed[0].tolist()


SCORED = f"""{COUNTER}
import pyarrow as pa, pyarrow.parquet as pq
pq.write_table(pa.table({{"labels": [sys.argv[3].split(",")]}}), out / "predictions.parquet")
(out / "costs.json").write_text(json.dumps({{"train_seconds": 1.0, "predict_seconds": 0.5, "model_bytes": 7}}))
"""


def test_a_benchmark_runs_what_has_no_row_and_compares_what_it_has(
    method: Method, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "results" / "auto.md"
    for split in ("train", "test"):
        write_labels(data / f"{split}.parquet", [["a"]])
    method.script.write_text(SCORED)
    known = {"set": [replace(method, name="xmc_ray-auto", options=("a",)), replace(method, name="peer", options=("b,a",))]}

    def measure(*extra: str) -> str:
        given = options(None, "auto").parse_args([f"--results={tmp_path / 'runs'}", f"--output={out}", *extra])
        benchmark = Benchmark(name="auto", given=given, minutes=1.0, same=("library",))
        benchmark.measure({"set": data}, known, read(benchmark.record("auto")))
        calls = tmp_path / "runs" / "set" / "calls"
        return calls.read_text() if calls.exists() else ""

    assert measure("--score") == "" and "falls short" in capsys.readouterr().out
    assert measure("--methods", "peer") == "x" and "nothing to compare yet" in capsys.readouterr().out
    assert measure() == "xx" and measure() == "xx"
    lines = capsys.readouterr().out.splitlines()
    assert "| P@1 | 100.00 | 0.00 | peer | +100.00 | ahead |" in lines
    assert lines[-1].startswith("auto: +0.00 points at the worst") and lines[-1].endswith("falls short")  # both know P@3
    assert list(read(out.with_suffix(".jsonl"))["set"]) == ["peer", "xmc_ray-auto"] and "## set" in out.read_text()
    sources.write_text("one = 2\n")
    assert (
        measure() == "xxxx" and measure("--again", "--methods", "peer") == "xxxxx"
    )  # both run by this Python, so by the library

"""The benchmarks of quality: predictions as files are scored as they should be, and a finished run is not run again."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _quality import PEERS, Method, peers, ranking, run, score
from hypothesis import given, settings
from hypothesis import strategies as st
from quality import TOTAL, described, margins, recipes, table

from xmc_ray.labels import LabelIndex

WRITER = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[2])
(out.parent / "calls").open("a").write("x")
(out / "costs.json").write_text(json.dumps({"train_seconds": 1.0, "predict_seconds": 0.5, "model_bytes": 7}))
"""


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), unique=True), max_size=5))
def test_ranking_has_the_first_ten_known_labels_in_their_places(rows: list[list[str]]) -> None:
    index = LabelIndex.count([pa.array([["a", "b"], list("bcdefghijklm")])])
    places = {name: place for place, name in enumerate(index.labels.to_pylist())}
    expected = [([places.get(label, -1) for label in row] + [-1] * 10)[:10] for row in rows]
    assert ranking(pa.array(rows, pa.list_(pa.string())), index).tolist() == expected


def write(file: Path, labels: list[list[str]]) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"labels": pa.array(labels, pa.list_(pa.string()))}), file)


def test_score_leaves_out_true_labels_that_training_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [["a", "b"], ["a"], ["c"]])
    write(tmp_path / "test.parquet", [["a", "new"], ["b", "c"], ["new"]])
    write(tmp_path / "out" / "predictions.parquet", [["a", "c"], ["a", "c", "b"], ["a"]])
    result = score(tmp_path, tmp_path / "out")
    assert (result["documents"], result["unlabelled"]) == (3, 1)
    assert result["total"]["P@1"] == 1 / 2
    assert np.isclose(result["total"]["P@3"], (1 + 2) / 6)


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr("_quality.ROOT", tmp_path)
    (tmp_path / "script.py").write_text(WRITER)
    return Method("one", tmp_path / "script.py")


def test_a_finished_run_is_kept_until_its_command_changes(method: Method, tmp_path: Path) -> None:
    out = tmp_path / "one"
    for options, calls in ((), "x"), ((), "x"), (("--deeper",), "xx"):
        assert run(Method(method.name, method.script, options), tmp_path, out)
        assert (tmp_path / "calls").read_text() == calls
    kept = json.loads((out / "run.json").read_text())
    assert kept["command"] == ["script.py", "--deeper"] and kept["model_bytes"] == 7 and kept["cpu_seconds"] >= 0


@pytest.mark.parametrize(("text", "minutes"), [("raise SystemExit(3)", None), ("import time; time.sleep(60)", 1e-3)])
def test_a_run_that_fails_or_takes_too_long_is_not_finished(
    method: Method, tmp_path: Path, text: str, minutes: float | None
) -> None:
    method.script.write_text(text)
    assert not run(method, tmp_path, tmp_path / "one", minutes=minutes)
    assert not (tmp_path / "one" / "run.json").exists()


def result(value: float) -> dict[str, object]:
    costs = {"train_seconds": 1, "predict_seconds": 2, "cpu_seconds": 3, "model_bytes": 4e6, "peak_bytes": 5e6}
    return {"total": dict.fromkeys(TOTAL, value), "bands": {"1": {"P@5": None}}, "costs": costs}


def test_margins_are_those_of_our_best_recipe_on_the_best_peer() -> None:
    points = margins({"a": result(0.5), "b": result(0.75)}, {"c": result(0.25), "d": result(0.625)})
    assert points == dict.fromkeys(TOTAL, 12.5)
    assert described({"P@1": 1.0, "P@3": -0.25}) == "Ahead of the best peer: P@1 +1.00. Behind: P@3 -0.25."


def test_table_has_the_best_first_and_as_many_cells_a_row() -> None:
    lines = table({"low": result(0.25), "high": result(0.5)}).splitlines()
    assert lines[2].startswith("| high | 50.00") and lines[3].startswith("| low | 25.00")
    assert len({line.count("|") for line in lines}) == 1


def test_every_peer_has_a_script_and_pinned_requirements() -> None:
    for peer in peers("encoder"):
        assert peer.script.exists()
        lines = (PEERS / f"{peer.environment}.txt").read_text().splitlines()
        assert all(line.startswith("#") or "==" in line for line in lines)


def test_several_seeds_make_a_row_of_their_own() -> None:
    one, ensemble = recipes("unheard-of", [1, 2], ["--loop.epochs=3"])
    assert (one.name, ensemble.name) == ("xmc_ray-small-cpu", "xmc_ray-small-cpu-x2")
    assert ensemble.options == ("--config=jobs/configs/small-cpu.toml", "--seeds", "1", "2", "--loop.epochs=3")

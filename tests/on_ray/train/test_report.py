"""The report at the end of a training job: of the run's own figures, and never the reason that a run fails."""

import json
import re
from pathlib import Path

import pytest
from pages import Page

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.on_ray.train import report
from xmc_ray.on_ray.train.config import TrainConfig


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

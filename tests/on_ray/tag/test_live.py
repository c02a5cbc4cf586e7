"""Live precision of nights: what is read, what is printed, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import document, read_night, write
from in_process import InProcess

from examples import filters
from xmc_ray import command
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.tag import job as tagging
from xmc_ray.on_ray.tag.retention import NightsConfig, run


@pytest.fixture(scope="module")
def bundle(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of words alone, made without Ray."""
    folder = tmp_path_factory.mktemp("words") / "bundle"
    filters.fit(str(tiny_encoder)).save(folder)
    return folder


@pytest.fixture
def tag(bundle: Path, tmp_path: Path) -> Callable[..., str]:
    """Tags a catalogue in this process."""

    def tag(documents: Path, **settings: Any) -> str:
        given = {"documents.uri": documents, "bundle": bundle, "output": tmp_path / "out", "date": "2026-11-23"}
        given |= {"k": 2, "pool.max": 1, "pool.threads": 1} | settings
        return tagging.tag(command.parse(tagging.TagConfig, [f"--{k}={v}" for k, v in given.items()]), InProcess())

    return tag


def job(output: Path, **settings: Any) -> None:
    given = [f"--{name}={value}" for name, value in settings.items()]
    run(command.parse(NightsConfig, ["feedback", f"--output={output}", *given]))


def verdicts(folder: str, path: Path, rejected: set[str]) -> Path:
    """On the first tag of each document of a night: accepted, but for some documents."""
    tags, _ = read_night(folder)
    first = [labels[0] for labels in tags["labels"].to_pylist()]
    words = ["rejected" if id in rejected else "accepted" for id in tags["id"].to_pylist()]
    pq.write_table(pa.table({"id": tags["id"], "label": first, "verdict": words}), path)
    return path


@pytest.mark.parametrize("place", ["out/tags/live.html", "out/tags/dt=2026-11-23/live.html", "feedback.parquet"])
def test_a_report_among_the_tags_or_over_the_feedback_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report lies in (tags|feedback)"):
        job(tmp_path / "out", feedback=tmp_path / "feedback.parquet", report=tmp_path / place)


def test_tags_that_editors_have_judged(tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the last nights; a night that reuses tags has them as well, but they count once in total."""
    output, catalogue = tmp_path / "out", write(tmp_path / "in.parquet", [document(n) for n in range(10)])
    folder = tag(catalogue, date="2026-11-22")
    ids = read_night(folder)[0]["id"].to_pylist()
    feedback = verdicts(folder, tmp_path / "feedback.parquet", {*ids[:2]})
    tag(catalogue, date="2026-11-23", previous="last")
    capsys.readouterr()
    job(output, feedback=feedback, report=tmp_path / "page.html")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "feedback: 8 accepted and 2 rejected labels of documents"
    assert said[1] == "precision of judged tags: 80.0% of 10 (49.0% to 94.3%); 0 accepted labels were not tagged"
    assert said[2:4] == [f"dt=2026-11-{day}  80.0% of 10 (49.0% to 94.3%)" for day in (23, 22)]
    assert any("mean score" in line or "promised" in line for line in said[4:])
    assert "49.0% to 94.3%" in (tmp_path / "page.html").read_text()
    job(output, feedback=feedback, last=1)
    assert "dt=2026-11-22" not in capsys.readouterr().out


def test_what_is_refused(tag: Callable[..., str], tmp_path: Path) -> None:
    feedback = tmp_path / "feedback.parquet"
    pq.write_table(pa.table({"id": ["1"], "label": ["of another catalogue"], "verdict": ["accepted"]}), feedback)
    with pytest.raises(DataError, match="no night is finished"):
        job(tmp_path / "out", feedback=feedback)
    tag(write(tmp_path / "in.parquet", [document(n) for n in range(10)]))
    with pytest.raises(DataError, match=r"the feedback is of another label set.*found 1 of 1 labels unknown"):
        job(tmp_path / "out", feedback=feedback)
    with pytest.raises(ConfigError, match=r"feedback is missing.*--feedback FILE\.parquet"):
        job(tmp_path / "out")

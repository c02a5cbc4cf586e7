"""What is exported of a night: by whom, and what becomes of a driver that falls silent. On a cluster: see test_cluster.py."""

import subprocess
import sys
import threading
from typing import get_args

import pyarrow as pa
import pytest
import ray

from xmc_ray.on_ray.tag import gauges
from xmc_ray.on_ray.tag.gauges import ActorBoard, Exporter, Value
from xmc_ray.on_ray.tag.status import Phase, Status
from xmc_ray.on_ray.tag.totals import Totals

Seen = dict[str, dict[tuple[str, ...], float]]  # name of a gauge -> value by its labels


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found: Seen = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.info, self.keys = {"name": name}, tag_keys

        def set(self, value: float, labels: dict[str, str]) -> None:
            found.setdefault(self.info["name"], {})[tuple(labels[key] for key in self.keys)] = value
            assert len(labels) == len(self.keys)

    monkeypatch.setattr(gauges, "Gauge", Recorder)
    return found


def test_each_value_of_a_status_has_a_gauge_with_its_labels(seen: Seen) -> None:
    sums = Totals(pa.table({"label": ["red"], "name": [None], "count": [1]}))
    sums.counts.update(tagged=7, rejected=2)
    sums.reasons.update({"text is empty": 2})
    status = Status("2026-11-23", totals=sums, drift={"training": 0.1})
    exporter = Exporter({"output": "a", "date": "2026-11-23"})
    for phase in get_args(Phase)[:-2]:
        status.phase = phase
        exporter.tell(status.values(), False)
        assert {key[-1] for key, value in seen["xmc_ray_phase"].items() if value} == {phase}
    assert seen["xmc_ray_documents"]["a", "2026-11-23", "tagged"] == 7
    assert seen["xmc_ray_rejects"] == {("a", "2026-11-23", "text is empty"): 2}
    assert len(seen["xmc_ray_tags"]) == 20 and "xmc_ray_failure_seconds" not in seen


def test_a_driver_that_falls_silent_has_failed_until_it_speaks_again(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = threading.Event()
    monkeypatch.setattr(gauges, "_AGAIN", 0.05)
    monkeypatch.setattr(gauges, "_SILENT", 0.0)
    export = Exporter._export

    def notice(self: Exporter) -> None:
        export(self)
        exported.set()

    monkeypatch.setattr(Exporter, "_export", notice)
    exporter = Exporter({"output": "a", "date": "b"})
    status = Status("2026-11-23")
    status.phase = "tagging"
    exporter.tell(status.values(), False)
    exported.clear()
    for _ in range(3):
        assert exported.wait(60)
        exported.clear()
    assert seen["xmc_ray_failure_seconds"]["a", "b"] > 1e9
    assert seen["xmc_ray_phase"]["a", "b", "failed"] == 1 and seen["xmc_ray_phase"]["a", "b", "tagging"] == 0
    exporter.tell(status.values(), True)  # over, so that it may be silent
    exported.clear()
    seen.clear()
    for _ in range(3):
        assert exported.wait(60)
        exported.clear()
    assert seen["xmc_ray_phase"]["a", "b", "tagging"] == 1 and "xmc_ray_failure_seconds" not in seen, (
        "and it is exported ever again"
    )


def test_what_a_lost_night_knew_is_kept() -> None:
    values: list[Value] = [("phase", {"phase": "gate"}, 1.0), ("phase", {"phase": "failed"}, 0.0), ("attempt", {}, 2.0)]
    values += [("left_seconds", {}, 60.0)]
    assert gauges.lost(values, 5.0) == [
        ("phase", {"phase": "gate"}, 0.0),
        ("phase", {"phase": "failed"}, 1.0),
        ("attempt", {}, 2.0),
        ("failure_seconds", {}, 5.0),
    ]


@pytest.mark.usefixtures("ray_session")
def test_a_board_replaces_the_one_of_its_name() -> None:
    first = ActorBoard("an output", {"output": "a", "date": "b"})
    first.tell([("attempt", {}, 1)], False, 60)
    second = ActorBoard("an output", {"output": "a", "date": "c"})
    second.tell([("attempt", {}, 2)], True, 60)
    with pytest.raises(ray.exceptions.RayActorError):
        first.tell([("attempt", {}, 1)], False, 60)
    ray.kill(ray.get_actor("an output", namespace="xmc_ray"))


def test_the_actors_process_does_not_load_what_a_model_needs() -> None:
    """It lives beside the head's own processes for as long as the cluster does."""
    script = "import sys, xmc_ray.on_ray.tag.gauges; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"

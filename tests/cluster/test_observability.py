"""The dashboard and the alert rules: every query can be parsed, and every metric of ours in it is one that the code has.

Prometheus itself evaluates the alerts here, on series of its test notation: values from minute to minute, ``_`` where there is
none, ``stale`` where the cluster is gone. That Ray really exports the series is shown by test_cluster.py, on a cluster that has
just worked.
"""

import re
import subprocess
from pathlib import Path

import promql_parser
import pytest
from checkout import ROOT
from observability import ALERTS, QUERIES, RECORDED, RULES, check_alerts, metrics, program

SUFFIXES = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
RAY = {"ray_actors", "ray_cluster_active_nodes", "ray_resources", "ray_object_store_memory"}


def exported() -> set[str]:
    """Our metrics under the names that Prometheus sees."""
    found = set()
    for path in (ROOT / "xmc_ray").rglob("*.py"):
        for kind, name in re.findall(r'\b(Counter|Gauge|Histogram)\(\s*"(xmc_ray_\w+)"', path.read_text()):
            found |= {f"ray_{name}{suffix}" for suffix in SUFFIXES[kind]}
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_queries_use_metrics_that_exist(name: str) -> None:
    used = metrics(QUERIES[name])
    assert used and used <= exported() | RECORDED | RAY


def test_a_misspelt_metric_would_be_found() -> None:
    assert metrics("sum(rate(ray_xmc_ray_document_total[5m])) / (a or b)") == {"ray_xmc_ray_document_total", "a", "b"}
    assert "ray_xmc_ray_documents" in exported() and "ray_xmc_ray_document" not in exported()
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum by rate(x[5m])")


def test_all_of_our_metrics_are_shown_and_explained() -> None:
    shown = set().union(*map(metrics, QUERIES.values()))
    operations = (ROOT / "docs/operations.md").read_text()
    for name in exported():
        family = re.sub("_(total|bucket|sum|count)$", "", name)
        assert any(other.startswith(family) for other in shown), name
        assert f"`{family.removeprefix('ray_')}`" in operations, name


def test_alerts_name_a_chapter_of_the_runbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operations.md").read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len(alerts) >= 5
    for alert in alerts:
        document, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert document == "docs/operations.md" and anchor in anchors, alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket") and alert["annotations"]["summary"]


def test_prometheus_takes_the_rules() -> None:
    subprocess.run([program("promtool"), "check", "rules", str(ALERTS)], check=True, capture_output=True)


def series(name: str, output: str = "a", date: str = "1970-01-01", worker: str = "w1", **labels: str) -> str:
    """A series as Ray exports it, with labels of its own that tell nothing about nights."""
    given = {"output": output, "date": date, **labels, "WorkerId": worker, "instance": "10.0.0.1:8080"}
    return f"ray_xmc_ray_{name}{{{','.join(f'{key}={chr(34)}{value}{chr(34)}' for key, value in given.items())}}}"


def phases(minutes: dict[str, str], **labels: str) -> dict[str, str]:
    return {series("phase", phase=phase, **labels): values for phase, values in minutes.items()}


NIGHT = {"output": "a", "date": "1970-01-01"}


@pytest.mark.parametrize("phase", ["census", "room", "gate", "reusing", "tagging", "publishing"])
def test_a_night_that_stands_still_is_told_in_every_phase_from_the_first_minute(phase: str, tmp_path: Path) -> None:
    """No document was ever done; the other night gets on every minute."""
    still = phases({phase: "1x60", "finished": "0x60"}) | {series("progress_seconds"): "0x60"}
    moves = phases({phase: "1x60"}, output="b") | {series("progress_seconds", output="b"): "0+60x60"}
    both = still | moves
    check_alerts(tmp_path, both, NightStandsStill={20: [], 21: [NIGHT | {"phase": phase}], 59: [NIGHT | {"phase": phase}]})


def test_a_night_that_has_ended_does_not_stand_still(tmp_path: Path) -> None:
    for over in ("finished", "failed"):
        ended = phases({"tagging": "1x5 0x60", over: "0x5 1x60"}) | {series("progress_seconds"): "0x65"}
        check_alerts(tmp_path, ended, NightStandsStill={30: [], 60: []})


def test_a_night_that_fails_is_told_at_once_until_it_is_made(tmp_path: Path) -> None:
    """On a standing cluster: fails after five minutes, is tried again from the tenth, and finished in the twentieth."""
    first = phases({"gate": "1x4 0 0 0 0 0 stale", "failed": "0x4 1 1 1 1 1 stale"}, worker="w1")
    first |= {series("failure_seconds", worker="w1"): "_x4 300 300 300 300 300 stale"}
    second = phases({"tagging": "_x9 1x9 0x20", "failed": "_x9 0x30", "finished": "_x9 0x9 1x20"}, worker="w2")
    second |= {series("success_seconds", worker="w2"): "_x19 1200x20", series("date_seconds", worker="w2"): "_x9 0x30"}
    check_alerts(tmp_path, first | second, NightFailed={4: [], 5: [NIGHT], 8: [NIGHT], 10: [], 19: [], 21: [], 30: []})


def test_a_failure_is_not_forgotten_with_its_cluster(tmp_path: Path) -> None:
    """A cluster of its own is gone ten minutes after its night has failed."""
    failed = phases({"tagging": "1x4 0x9 stale", "failed": "0x4 1x9 stale"}) | {series("failure_seconds"): "_x4 300x9 stale"}
    check_alerts(tmp_path, failed, NightFailed={5: [NIGHT], 60: [NIGHT], 200: [NIGHT]}, NightVanished={14: [], 60: []})


def test_an_attempt_that_is_refused_beside_a_night_at_work_is_no_failed_night(tmp_path: Path) -> None:
    works = phases({"tagging": "1x20 0x20", "finished": "0x20 1x20"}) | {series("success_seconds"): "_x20 1260x20"}
    refused = phases({"failed": "_x5 1x40"}, worker="w2") | {series("failure_seconds", worker="w2"): "_x5 300x40"}
    check_alerts(tmp_path, works | refused, NightFailed={6: [], 20: [], 22: [], 40: []})


def test_a_cluster_that_is_lost_is_told(tmp_path: Path) -> None:
    lost = phases({"tagging": "1x9 stale", "finished": "0x9 stale"})
    again = phases({"census": "_x29 1x40"}, worker="w2")
    check_alerts(tmp_path, lost, NightVanished={9: [], 16: [NIGHT], 40: [NIGHT]})
    check_alerts(tmp_path, lost | again, NightVanished={16: [NIGHT], 31: []})


def test_a_missing_night_is_missed_for_its_output_alone(tmp_path: Path) -> None:
    """``a`` fails to come on its third day; ``b`` comes every day; ``c`` was a trial; nights made up for are no news."""
    day = 24 * 60
    nights = {}
    for output, days in (("a", (0, 1)), ("b", (0, 1, 2)), ("c", (0,))):
        for n in days:
            labels = {"output": output, "date": f"1970-01-0{n + 1}"}
            came = f"_x{n * day + 59} {n * 86400 + 3600}x20"
            nights |= {
                series("success_seconds", **labels): came,
                series("date_seconds", **labels): f"_x{n * day + 59} {n * 86400}x20",
            }
    late = {"output": "a", "date": "1969-12-01"}
    nights |= {series("success_seconds", **late): f"_x{2 * day + 59} {2 * 86400 + 3600}x20"}
    nights |= {series("date_seconds", **late): f"_x{2 * day + 59} {-31 * 86400}x20"}
    missing = {2 * day + 120: [], 2 * day + 180 + 20: [{"output": "a"}], 3 * day + 60: [{"output": "a"}]}
    check_alerts(tmp_path, nights, NightMissing=missing)


def test_no_night_at_all_is_missed(tmp_path: Path) -> None:
    check_alerts(tmp_path, {"up": "1x60"}, NightMissing={10: [], 16: [{}]})


def test_many_rejects_labels_that_moved_and_storage_that_is_away(tmp_path: Path) -> None:
    values = {series("rejects", reason="text is empty"): "0 4 4 4", series("rejects", reason="id is null"): "0 0 2 2"}
    values |= {series("rows", what="all"): "1000x3", series("rows", what="to tag"): "100x3"}
    values |= {series("drift", against="training"): "_ _ 0.3 0.3", series("drift", against="previous"): "_ _ 0.1 0.1"}
    values |= {series("storage_silent_seconds"): "0 30 90 0"}
    moved = [NIGHT | {"against": "training"}]
    fires = {"ManyRejects": {1: [], 2: [NIGHT]}, "LabelsMoved": {1: [], 2: moved}, "StorageAway": {1: [], 2: [NIGHT], 3: []}}
    check_alerts(tmp_path, values, **fires)


def test_an_alert_that_does_not_fire_would_be_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="NightFailed"):
        check_alerts(tmp_path, {"up": "1x60"}, NightFailed={10: [NIGHT]})

"""The dashboard and the alert rules: every query can be parsed, and every metric of ours in it is one that the code has.

That Ray really exports all of them is shown by test_cluster.py, on a cluster that has just worked.
"""

import re

import promql_parser
import pytest
from checkout import ROOT
from observability import QUERIES, RECORDED, RULES, metrics

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
    assert "ray_xmc_ray_documents_total" in exported() and "ray_xmc_ray_document_total" not in exported()
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

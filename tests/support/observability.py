"""The queries of the dashboard and of the alert rules."""

import json
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml
from checkout import ROOT

RULES = [rule for group in yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())["groups"] for rule in group["rules"]]


PANELS = json.loads((ROOT / "cluster/grafana.json").read_text())["panels"]


QUERIES = {rule.get("alert") or rule["record"]: rule["expr"] for rule in RULES}


QUERIES |= {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}


RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def metrics(query: str) -> set[str]:
    """The names of the metrics in a query."""
    return {node.name for node in nodes(promql_parser.parse(query)) if isinstance(node, promql_parser.VectorSelector)}


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for field in ("lhs", "rhs", "expr", "param", "args", "vector_selector"):
        below = getattr(node, field, None)
        for child in below if isinstance(below, list) else [below]:
            if type(child).__module__ == type(node).__module__:
                yield from nodes(child)

"""The queries of the dashboard and of the alert rules, and Prometheus itself, to evaluate them."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import promql_parser
import pytest
import yaml
from checkout import ROOT

ALERTS = ROOT / "cluster/alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


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


def program(name: str) -> str:
    """A program of Prometheus; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; it comes with Debian's package prometheus")
    return found


Firing = Mapping[int, Sequence[Mapping[str, str]]]  # minute -> labels of each alert that fires then, beside the rule's own


def check_alerts(folder: Path, series: Mapping[str, str], **fires: Firing) -> None:
    """Assert when each of some alerts fires; Prometheus evaluates the rules.

    ``series``: their values from minute to minute, from 0, in promtool's notation.
    """
    cases = []
    for alert, minutes in fires.items():
        own = next(rule["labels"] for rule in RULES if rule.get("alert") == alert)
        for minute, labels in minutes.items():
            expected = [{"exp_labels": own | dict(each)} for each in labels]
            cases.append({"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected})
    # Without annotations, which every case would have to repeat.
    rules = [{name: value for name, value in rule.items() if name != "annotations"} for rule in RULES]
    test = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": test, "alert_rule_test": cases}
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "rules", "rules": rules}]}))
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]})
    )
    command = [program("promtool"), "test", "rules", str(folder / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def prometheus(folder: Path, pages: Sequence[str], port: int) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """A Prometheus that scrapes metrics pages and evaluates our rules; asks it a query. A busy head takes seconds to answer."""
    config = {
        "global": {"scrape_interval": "10s", "evaluation_interval": "2s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [urlsplit(page).netloc for page in pages]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{port}"
    command = [program("prometheus"), f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]

    def ask(query: str) -> list[dict[str, Any]]:
        """The samples, as their labels with the ``value``."""
        try:
            with urlopen(f"http://{address}/api/v1/query?{urlencode({'query': query})}", timeout=30) as answer:
                result = json.load(answer)["data"]["result"]
        except URLError:  # it has just been started
            return []
        return [{**sample["metric"], "value": float(sample["value"][1])} for sample in result]

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield ask
    finally:
        process.kill()
        process.wait()

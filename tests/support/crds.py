"""Cuts what the manifests of cluster/kuberay need out of the schemas of two operators, into tests/cluster/kuberay/.

    PYTHONPATH=tests/support python tests/support/crds.py CHECKOUT_OF_KUBERAY CHECKOUT_OF_PROMETHEUS_OPERATOR

Of what an operator adds to Kubernetes an excerpt has every field, so that a field of another version is known to be missing.
Pods are Kubernetes' own: of their fields it has those that some manifest uses and this version knows.
"""

import json
import subprocess
import sys
from typing import Any

import yaml
from schemas import EXCERPTS, MANIFESTS, documents

KUBERAY = ("v1.4.2", "v1.5.1", "v1.6.2", "v1.7.0")
KINDS = {
    kind: f"helm-chart/kuberay-operator/crds/ray.io_{kind.lower()}s.yaml" for kind in ("RayCluster", "RayJob", "RayCronJob")
}
PROMETHEUS = "v0.93.0"
MONITOR = {"PodMonitor": "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"}
PODS = {"template", "submitterPodTemplate", "env", "envFrom", "volumeMounts", "securityContext", "resources"}
OURS = {"properties", "items", "additionalProperties", "type", "required", "enum", "nullable"}


def excerpt(schema: dict[str, Any], used: list[Any], pod: bool = False) -> dict[str, Any]:
    """The schema without descriptions and, inside of pods, without what none of the values ``used`` here has."""
    result = {name: part for name, part in schema.items() if name in OURS or name.startswith("x-kubernetes-")}
    if "properties" in schema:
        names = {name for value in used if isinstance(value, dict) for name in value}
        result["properties"] = {
            name: excerpt(part, [value[name] for value in used if name in value], pod or name in PODS)
            for name, part in schema["properties"].items()
            if not pod or name in names
        }
        result["required"] = [name for name in schema.get("required", ()) if name in result["properties"]]
    if isinstance(schema.get("items"), dict):
        result["items"] = excerpt(schema["items"], [item for value in used for item in value], pod)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = excerpt(schema["additionalProperties"], [], pod)
    return {name: part for name, part in result.items() if part not in ([], None)}


def of_version(checkout: str, version: str, paths: dict[str, str]) -> dict[str, Any]:
    """The excerpts of the kinds that a version has."""
    manifests = [manifest for path in MANIFESTS for manifest in documents(path)]
    kinds = {}
    for kind, path in paths.items():
        show = ["git", "-C", checkout, "show", f"{version}:{path}"]
        shown = subprocess.run(show, capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            (served,) = (each for each in yaml.safe_load(shown.stdout)["spec"]["versions"] if each["name"] == "v1")
            schema = served["schema"]["openAPIV3Schema"]
            schema["properties"].pop("status", None)
            kinds[kind] = excerpt(schema, [manifest for manifest in manifests if manifest["kind"] == kind])
    return kinds


if __name__ == "__main__":
    kuberay, prometheus = sys.argv[1:]
    parts = {version: of_version(kuberay, version, KINDS) for version in KUBERAY}
    parts["prometheus-operator"] = of_version(prometheus, PROMETHEUS, MONITOR)
    for name, kinds in parts.items():
        (EXCERPTS / f"{name}.json").write_text(json.dumps(kinds, separators=(",", ":"), sort_keys=True) + "\n")

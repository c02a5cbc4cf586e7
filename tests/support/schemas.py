"""What Kubernetes and KubeRay accept, as far as it can be told without them; for cluster/test_files.py."""

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from checkout import ROOT
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

EXCERPTS = ROOT / "tests" / "cluster" / "kuberay"  # made by crds.py
VERSIONS = sorted(path.stem for path in EXCERPTS.glob("v*.json"))  # of KubeRay
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
KUBERNETES = "1.32"

OPERATORS = {"ray.io/v1", "monitoring.coreos.com/v1"}  # whose kinds are not Kubernetes' own

Document = dict[str, Any]


def documents(file: Path | str) -> list[Document]:
    """The manifests of a file, or of its text, and those inside its ConfigMaps."""
    text = file.read_text() if isinstance(file, Path) else file
    found = [document for document in yaml.safe_load_all(text) if document]
    inner = [text for document in found if document["kind"] == "ConfigMap" for text in document["data"].values()]
    return found + [document for text in inner for document in yaml.safe_load_all(text)]


def check(manifest: Document, kuberay: str = VERSIONS[-1]) -> None:
    """Raise a ValidationError where the API server would turn the manifest away, or drop a key that it does not know."""
    if manifest["apiVersion"] in OPERATORS:
        error = best_match(_validator(manifest["kind"], kuberay).iter_errors(manifest))
        if error is not None:
            raise error
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def accepts(manifest: Document, kuberay: str = VERSIONS[-1]) -> bool:
    """Whether `check` has nothing to say."""
    try:
        check(manifest, kuberay)
    except (ValidationError, kubernetes_validate.ValidationError):
        return False
    return True


@cache
def _validator(kind: str, kuberay: str) -> Draft202012Validator:
    """A kind that the version does not have accepts nothing."""
    name = "prometheus-operator" if kind == "PodMonitor" else kuberay
    return Draft202012Validator(_closed(json.loads((EXCERPTS / f"{name}.json").read_text()).get(kind, {"enum": []})))


def _closed(schema: Any) -> Any:
    """A structural OpenAPI schema as JSON schema, in which a key that it does not name is an error."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: part for name, part in schema.items() if name not in {"properties", "format", "default"}}
    result = {name: _closed(part) for name, part in result.items() if not name.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if result.pop("nullable", False):
        result["type"] = [result["type"], "null"]
    if "properties" in schema:
        result["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result


def keys(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key of a manifest."""
    if isinstance(part, dict):
        yield from ((*path, name) for name in part)
    for name, child in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        yield from keys(child, (*path, name))


def misspelt(manifest: Document, path: tuple[Any, ...]) -> Document:
    """The manifest with an ``x`` behind one key."""
    changed = copy.deepcopy(manifest)
    parent: Any = changed
    for name in path[:-1]:
        parent = parent[name]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return changed


def having(part: Any, name: str) -> Iterator[Document]:
    """The mappings, at any depth, that have a key of this name."""
    for child in part if isinstance(part, list) else part.values() if isinstance(part, dict) else ():
        yield from having(child, name)
    if isinstance(part, dict) and name in part:
        yield part

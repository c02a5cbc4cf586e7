"""Tags over HTTP: those of the classifier, together or alone, and what a request has wrong."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from cluster.local import free_ports
from xmc_ray.classifier import XMCClassifier
from xmc_ray.errors import ModelError

serve = pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")

TEXTS = ["a red apple", "a green pear", "", "a yellow plum and a grape", "深度学习 7 green pears"]
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def bundle(trained: Path) -> str:
    return str(trained / "bundle")


@pytest.fixture(scope="module")
def ask(ray_session: None, bundle: str) -> Iterator[Ask]:
    """Status and answer of a request to the running application."""
    from xmc_ray.serve import ServeConfig, app

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app(ServeConfig(bundle=bundle, k=4, wait=0.05)), name="tagging")

        def ask(path: str, body: object = None) -> tuple[int, Any]:
            data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        yield ask
    finally:
        serve.shutdown()


def test_tags_are_those_of_the_classifier_however_requests_meet(ask: Ask, bundle: str) -> None:
    classifier = XMCClassifier.load(bundle, "cpu")
    expected = classifier.predict(TEXTS, 4)
    names = dict(zip(classifier.ensemble.labels.labels.to_pylist(), classifier.ensemble.labels.names.to_pylist(), strict=True))
    requests = [TEXTS, *([text] for text in TEXTS), []] * 4
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda texts: ask("/tag", {"texts": texts}), requests))
    for texts, (status, answer) in zip(requests, answers, strict=True):
        assert status == 200 and answer["model"] == classifier.bundle.fingerprint and len(answer["tags"]) == len(texts)
        for text, tags in zip(texts, answer["tags"], strict=True):
            wanted = expected[TEXTS.index(text)]
            assert [tag["label"] for tag in tags] == [label for label, _ in wanted]
            assert [tag["score"] for tag in tags] == pytest.approx([score for _, score in wanted], abs=0.02)  # in bfloat16
            assert all(tag["name"] == names[tag["label"]] for tag in tags)


def test_fewer_labels_and_a_least_score(ask: Ask) -> None:
    _, whole = ask("/tag", {"texts": TEXTS[:1]})
    _, some = ask("/tag", {"texts": TEXTS[:1], "k": 2})
    assert some["tags"][0] == whole["tags"][0][:2]
    least = whole["tags"][0][1]["score"]
    _, good = ask("/tag", {"texts": TEXTS[:1], "min_score": least})
    assert good["tags"][0] == [tag for tag in whole["tags"][0] if tag["score"] >= least]


def test_health_says_which_model_answers(ask: Ask, bundle: str) -> None:
    status, health = ask("/health")
    assert (status, health["bundle"], health["labels"]) == (200, [bundle], 8)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"texts": ["a"], "k": 5}, 400, "k is above that of this service; found 5; expected at most 4"),
        ({"texts": [{"title": "a"}]}, 400, "text"),
        ({"texts": [7]}, 422, "valid string"),
        ({"texts": ["a"], "k": 0}, 422, "greater than or equal to 1"),
        ({"texts": ["a"] * 1001}, 422, "at most 1000"),
        ({"text": "a"}, 422, "Field required"),
        (b"garbage", 422, "JSON decode error"),
        (b'{"texts": ["\\ud800"]}', 422, "texts.0"),
        (b'{"texts": "\\ud800"}', 422, "texts: Input should be a valid list"),
        (b'{"texts": ["a"], "min_score": NaN}', 422, "min_score: Input should be less than or equal to 1"),
        (b"[NaN]", 422, "valid dictionary"),
        ({"texts": [7, 8]}, 422, "1 more"),
        ({"texts": [], "a secret": "another secret"}, 422, "expected: Extra inputs are not permitted"),
    ],
)
def test_what_a_request_has_wrong_is_its_own(body: object, status: int, told: str, ask: Ask) -> None:
    """Those that it is predicted together with do not suffer."""
    with ThreadPoolExecutor(4) as clients:
        good = [clients.submit(ask, "/tag", {"texts": TEXTS[:1]}) for _ in range(3)]
        found, answer = ask("/tag", body)
        assert [one.result()[0] for one in good] == [200] * 3
    assert found == status and told in answer["detail"] and "secret" not in answer["detail"]


def test_an_application_of_wrong_settings_is_not_built(tmp_path: Path) -> None:
    from pydantic import ValidationError

    from xmc_ray.serve import ServeConfig, app

    for settings in ({}, {"bundle": "x", "k": 0}, {"bundle": "x", "bundles": "y"}):
        with pytest.raises(ValidationError):
            ServeConfig(**settings)
    with pytest.raises(ModelError, match="not a finished bundle"):
        app(ServeConfig(bundle=str(tmp_path)))


def test_a_replica_that_finds_another_bundle_does_not_answer(bundle: str, tmp_path: Path) -> None:
    """Kind: an address that is resolved again. Else replicas that start later would answer by another model."""
    from xmc_ray.bundle.members import Members
    from xmc_ray.serve import ServeConfig, opened

    place = shutil.copytree(bundle, tmp_path / "bundle")
    members = Members.read(place)
    shutil.rmtree(place)
    shutil.copytree(ROOT / "tests/kept/0.1.0/bundle", place)
    with pytest.raises(ModelError, match="has been replaced by another"):
        opened(ServeConfig(bundle=str(place)), members)

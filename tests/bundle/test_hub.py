"""Bundles on a model hub, which is a server of this machine: what was pushed comes back, and is known by its commit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fruit import document
from hub import Hub, running_hub
from huggingface_hub import ModelCard, constants
from in_process import InProcess

from xmc_ray.bundle.folder import local_bundle
from xmc_ray.bundle.hub import download, pinned
from xmc_ray.bundle.members import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.command import parse
from xmc_ray.errors import ConfigError, ModelError, UnavailableError
from xmc_ray.on_ray.tag import job, retention
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.nights import manifest_of
from xmc_ray.storage import exists, normalise

TEXTS = ["a red apple", "a green pear"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False, raising=False)
        yield hub


@pytest.fixture
def classifier(trained: Path) -> XMCClassifier:
    return XMCClassifier.load(trained / "bundle", "cpu")


def test_what_is_pushed_comes_back(hub: Hub, classifier: XMCClassifier) -> None:
    address = classifier.push_to_hub("shop/tags", message="of this week")
    commit, files = hub.models["shop/tags"][-1]
    assert address == f"hf://shop/tags@{commit}"
    assert files["README.md"].startswith(b"---\nlibrary_name: xmc_ray\n"), "the card of a model begins so"
    assert {"config.json", "model.safetensors", "tokenizer.json", "encoder/config.json"} <= set(files)
    for place in ("hf://shop/tags", address):
        again = XMCClassifier.load(place, "cpu")
        assert again.bundle.fingerprint == json.loads(files["config.json"])["fingerprint"]
        assert again.predict(TEXTS, 3) == classifier.predict(TEXTS, 3)


def test_the_card_says_what_the_hub_asks_for(hub: Hub, classifier: XMCClassifier) -> None:
    classifier.push_to_hub("shop/tags", license="apache-2.0", datasets=["shop/titles", 'shop/"odd": names'])
    card = ModelCard(hub.models["shop/tags"][-1][1]["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.datasets == ["shop/titles", 'shop/"odd": names']
    assert card.data.library_name == "xmc_ray" and "LightXML" in card.text
    assert XMCClassifier.load("hf://shop/tags", "cpu").predict(TEXTS, 3) == classifier.predict(TEXTS, 3)


def test_a_bundle_that_was_looked_at_is_known_by_its_commit(hub: Hub, classifier: XMCClassifier) -> None:
    """Kind: an address that is resolved again. Another is pushed to the same name before the actors load it."""
    first = classifier.push_to_hub("shop/tags")
    members = Members.read("hf://shop/tags")
    assert members.uris == [first]
    classifier.bundle.metrics = {"P@1": 0.0}
    second = classifier.push_to_hub("shop/tags")
    assert second != first and Members.read("hf://shop/tags").uris == [second]
    with local_bundle(members.uris[0], members.fingerprints[0]) as folder:
        assert json.loads((folder / "config.json").read_text())["fingerprint"] == members.fingerprints[0]
    with pytest.raises(ModelError, match="has been replaced by another"), local_bundle(second, members.fingerprints[0]):
        pass


def test_files_of_before_are_gone_and_stay_in_their_commit(hub: Hub, classifier: XMCClassifier) -> None:
    hub.models["shop/tags"] = [("1" * 40, {"old.bin": b"old", "README.md": b"old"})]
    classifier.push_to_hub("shop/tags")
    assert "old.bin" not in hub.models["shop/tags"][-1][1]
    assert sorted(path.name for path in download("hf://shop/tags@" + "1" * 40).iterdir()) == ["README.md", "old.bin"]


@pytest.mark.parametrize("private", [True, False])
def test_a_model_that_is_there_is_not_written_where_others_see_more_than_asked_for(
    private: bool, hub: Hub, classifier: XMCClassifier
) -> None:
    hub.models["shop/tags"] = [("1" * 40, {})]
    if not private:
        hub.private.add("shop/tags")
    found = "a public one" if private else "a private one"
    with pytest.raises(ConfigError, match=f"the model is there already: hf://shop/tags; found {found}"):
        classifier.push_to_hub("shop/tags", private=private)
    assert len(hub.models["shop/tags"]) == 1
    classifier.push_to_hub("shop/tags", private=not private)
    classifier.push_to_hub("shop/new", private=private)
    assert ("shop/new" in hub.private) == private


def test_a_push_changes_nothing_here(hub: Hub, classifier: XMCClassifier) -> None:
    """The copy that is pushed has a card, and so a fingerprint, of its own."""
    before = classifier.bundle.fingerprint
    classifier.push_to_hub("shop/tags", license="mit")
    hub.status = 503
    with pytest.raises(UnavailableError):
        classifier.push_to_hub("shop/tags", license="apache-2.0")
    assert classifier.bundle.fingerprint == before


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("hf://shop/none", ModelError, "no such model on the hub: hf://shop/none"),
        ("hf://shop/tags@other", ModelError, "no such model on the hub"),
        ("hf://shop", ConfigError, "not an address of a model hub"),
        ("hf://shop/tags/deeper", ConfigError, "not an address of a model hub"),
    ],
)
def test_what_is_not_there_is_one_line(address: str, error: type[Exception], told: str, hub: Hub) -> None:
    hub.models["shop/tags"] = [("1" * 40, {})]
    with pytest.raises(error, match=told) as caught:
        XMCClassifier.load(address, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error", "told"), [(503, UnavailableError, "does not answer"), (403, ConfigError, "refuses")]
)
def test_a_hub_that_fails_or_refuses_is_one_line(
    status: int, error: type[Exception], told: str, hub: Hub, classifier: XMCClassifier
) -> None:
    hub.status = status
    for act in (lambda: pinned("hf://shop/tags"), lambda: classifier.push_to_hub("shop/tags")):
        with pytest.raises(error, match=f"the hub {told}: hf://shop/tags") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_hub_that_is_away_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="the hub does not answer: hf://shop/tags"):
        pinned("hf://shop/tags")


def test_other_places_are_left_alone_and_a_hub_holds_bundles_alone() -> None:
    assert pinned("/a/folder") == "/a/folder" and pinned("s3://shop/bundle") == "s3://shop/bundle"
    assert normalise("hf:/shop/tags/") == "hf://shop/tags"
    with pytest.raises(ConfigError, match="a model hub has no files for this"):
        exists("hf://shop/tags/config.json")


def test_a_night_notes_the_commit_and_leaves_the_hub_alone_when_it_is_removed(
    hub: Hub, classifier: XMCClassifier, tmp_path: Path
) -> None:
    address = classifier.push_to_hub("shop/tags")
    pq.write_table(pa.Table.from_pylist([document(number) for number in range(5)]), tmp_path / "in.parquet")
    settings = {"documents.uri": tmp_path / "in.parquet", "bundle": "hf://shop/tags", "output": tmp_path / "out"}
    for day in (22, 23):
        arguments = [f"--{name}={value}" for name, value in {**settings, "date": f"2026-11-{day}"}.items()]
        night = job.tag(parse(TagConfig, arguments), InProcess())
    assert manifest_of(night)["config"]["bundle"] == address
    decided = retention.decide(str(tmp_path / "out"), 1)
    assert [bool(stay.why) for stay in decided].count(False) == 1 and retention.unused_bundles(decided) == []
    assert hub.models["shop/tags"][-1][0] in address

"""Bundles by their settings: identity, arithmetic, what they read; on one that an earlier release made."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from checkout import ROOT

from xmc_ray.bundle.folder import fingerprint_of
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.model.tokenizer import Tokenizer

KEPT = ROOT / "tests/kept/0.1.0/bundle"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same content, of shorter texts."""
    folder = Path(shutil.copytree(KEPT, tmp_path / "other"))
    settings = json.loads((folder / "config.json").read_text()) | {"max_tokens": 5}
    files, _ = settings.pop("files"), settings.pop("fingerprint")
    (folder / "config.json").write_text(json.dumps(settings | {"fingerprint": fingerprint_of(settings, files), "files": files}))
    return folder


def test_an_ensemble_is_identified_by_its_members_in_order(other: Path) -> None:
    one, two, turned = (Members.read(uris) for uris in ([KEPT], [KEPT, other], [other, KEPT]))
    assert one.fingerprint == one.fingerprints[0] == two.fingerprints[0] == turned.fingerprints[1]
    assert len({one.fingerprint, two.fingerprint, turned.fingerprint}) == 3
    assert len(two.fingerprint) == 16 and int(two.fingerprint, 16) > 0
    with pytest.raises(ConfigError, match="no bundle is given"):
        Members.read([])


def test_a_driver_fetches_labels_and_the_distinct_tokenizers(other: Path) -> None:
    members = Members.read([KEPT, other, KEPT])
    table, tokenizers = members.fetch()
    assert table["label"].combine_chunks().equals(members.labels())
    assert [tokenizer.max_tokens for tokenizer in tokenizers] == members.max_tokens[:2] and members.max_tokens[1] == 5
    texts = pa.array(["a red apple", "", "a green pear and seven yellow plums, 42 grapes"])
    for tokenizer in tokenizers:  # as with all of transformers
        whole, loaded = Tokenizer.of_bundle(KEPT, tokenizer.max_tokens), Tokenizer.load(KEPT, tokenizer.max_tokens)
        assert tokenizer.fingerprint == whole.fingerprint and tokenizer.pretrained.get_vocab() == whole.pretrained.get_vocab()
        for other_one in (whole, loaded):
            assert tokenizer.encode(texts)[0].equals(other_one.encode(texts)[0])


def test_thresholds_are_those_of_calibrations(trained: Path) -> None:
    one, two = Members.read(trained / "bundle"), Members.read([trained / "bundle"] * 2)
    np.testing.assert_array_equal(one.thresholds(0.5), two.thresholds(0.5))
    assert len(one.thresholds(0.5)) == len(one.labels())
    with pytest.raises(ConfigError, match="min_precision needs a calibrated bundle"):
        Members.read(KEPT).thresholds(0.5)


def test_arithmetic_is_named_for_each(other: Path) -> None:
    members = Members.read([KEPT, other])
    assert members.computed_by("float32", "cpu") == ["cpu float32"] * 2
    assert members.computed_by("auto", "cuda:1") == ["cuda bfloat16"] * 2
    assert members.calibration_warning(members.computed_by("auto", "cuda")) is None, "they are not calibrated"
    assert members.reading(DocumentsConfig(uri="x")) == DocumentsConfig(uri="x")


def test_members_with_other_labels_or_fields_are_refused(other: Path) -> None:
    settings = json.loads((other / "config.json").read_text())
    files, _ = settings.pop("files"), settings.pop("fingerprint")
    for change, told in (
        ({"label_fingerprint": "0" * 16}, "different labels"),
        ({"fields": [{"name": "title", "weight": 1.0, "first": None}], "xmc_ray_format": 5}, "different fields"),
    ):
        changed = settings | change
        marker = changed | {"fingerprint": fingerprint_of(changed, files), "files": files}
        (other / "config.json").write_text(json.dumps(marker))
        with pytest.raises(ModelError, match=told):
            Members.read([KEPT, other])

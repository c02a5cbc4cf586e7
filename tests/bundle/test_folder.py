"""The folder of a bundle: what identifies it, and what is no bundle; on one that an earlier release has made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from checkout import ROOT

from xmc_ray.bundle.folder import fields_of, fingerprint_of, local_bundle, read_calibration, read_settings
from xmc_ray.data.fields import Field
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ModelError, XmcError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests/kept/0.1.0/bundle", tmp_path / "bundle"))


def changed(**settings: object) -> Callable[[Path], object]:
    """Writes other settings, whose fingerprint is right or not."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_bundle_is_known_by_its_settings(bundle: Path) -> None:
    settings = read_settings(str(bundle))
    own = {name: value for name, value in settings.items() if name not in ("files", "fingerprint")}
    assert settings["fingerprint"] == fingerprint_of(own, settings["files"])
    assert fingerprint_of(own | {"max_tokens": 1}, settings["files"]) != settings["fingerprint"]
    assert fields_of(settings) == ()
    assert fields_of({"fields": [{"name": "title", "weight": 2.0, "first": None}]}) == (Field("title", 2.0, None),)


def test_its_local_folder_is_the_one_that_was_read(bundle: Path) -> None:
    fingerprint = read_settings(str(bundle))["fingerprint"]
    with local_bundle(str(bundle), fingerprint) as folder:
        assert folder == bundle
        labels = LabelIndex.from_table(pq.read_table(folder / "labels.parquet"))
        assert read_calibration(folder, labels) is None, "it was made without"
    with pytest.raises(ModelError, match="has been replaced by another"), local_bundle(str(bundle), "0" * 16):
        pass
    with pytest.raises(ModelError, match="has changed while it was read"), local_bundle(str(bundle), fingerprint):
        (bundle / "metrics.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (changed(files=None), "config.json; found a content that does not match its digest"),
        (changed(max_tokens=5), "config.json; found a content that does not match its digest"),
        (changed(xmc_ray_format=2), "found format 2; expected format 4; train again, or use the release that wrote it"),
        (changed(xmc_ray_format=99), "found format 99; expected format 4; upgrade xmc_ray"),
        (lambda path: path.write_text('{"model_type": "bert"}'), "not a bundle of xmc_ray"),
        (lambda path: path.write_text('{"xmc_ray_format": 1, "fi'), "not a JSON file"),
        (Path.unlink, "not a finished bundle"),
        (lambda path: (path.parent / "labels.parquet").unlink(), "labels.parquet; found no such file"),
        (lambda path: (path.parent / "README.md").write_text(""), "README.md; found 0 bytes"),
    ],
)
def test_what_is_no_bundle_is_refused_in_one_line(damage: Callable[[Path], object], told: str, bundle: Path) -> None:
    damage(bundle / "config.json")
    with pytest.raises(XmcError) as caught:
        read_settings(str(bundle))
    assert told in str(caught.value) and "\n" not in str(caught.value)

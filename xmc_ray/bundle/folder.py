"""The bundle: a trained model as a folder, local or on object storage.

    config.json          format, shapes, settings, and size and digest of every other file; written last: a folder without
                         it, or with a file that does not match it, is not a bundle
    model.safetensors    all weights, those of the linear ranker too, and the lift of each group if there is one
    encoder/config.json  the transformer's own config
    tokenizer.json ...   the tokenizer
    labels.parquet       label, name, count, group, threshold; row = id
    calibration.parquet  held-out predictions: label (id), score, hit; missing where no documents were held out for it
    metrics.json         metrics in validation; below ``extension``, those of the model before it was extended
    run.toml             the settings of the run that made it
    README.md            model card

No pickle anywhere. What is in it, `content` reads and writes; here it is identified, checked and fetched, without torch.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.bundle.hub import download, is_hub
from xmc_ray.data.fields import Field, Fields
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ModelError
from xmc_ray.metrics.calibration import Calibration
from xmc_ray.storage import folders

FORMAT = 4  # 1 to 3 were never released
WITH_FIELDS = 5  # of a bundle with fields, which earlier releases would read as plain texts
_NO_MATCH = "a content that does not match its digest"

MARKER = "config.json"
WEIGHTS_FILE = "model.safetensors"
LABELS_FILE = "labels.parquet"
CALIBRATION_FILE = "calibration.parquet"
CALIBRATED_BY = "calibrated_by"  # in config.json: the arithmetic of the scores in that file; older bundles lack it


@contextmanager
def local_bundle(uri: str, fingerprint: str) -> Iterator[Path]:
    """The local folder of a bundle, for a body that reads it.

    It is verified by its digests: a download once, a folder on this machine whenever its files have been touched. Raises
    ModelError if it is another bundle than that of ``fingerprint``, or damaged, or if it has changed when the body ends.
    """
    if is_hub(uri):
        uri = str(download(uri))
    verified: folders.Stamps = {}
    folder = folders.node_copy(uri, fingerprint, lambda folder: verified.update(_verify(folder, uri, fingerprint)))
    try:
        yield folder
    finally:
        if folders.stamps(folder, verified) != verified:
            raise ModelError("the bundle has changed while it was read", where=uri, way_out="run again")


def read_calibration(folder: Path, labels: LabelIndex) -> Calibration | None:
    """The calibration of a bundle in a local folder; None if it has none."""
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    arithmetic = json.loads((folder / MARKER).read_text()).get(CALIBRATED_BY)
    return Calibration.from_table(pq.read_table(path), labels.counts, arithmetic)


def read_settings(uri: str) -> dict[str, Any]:
    """The content of a bundle's ``config.json``, after a check that all files are complete.

    Raises ModelError where there is no bundle, or one that is damaged or has another format.
    """
    if is_hub(uri):
        uri = str(download(uri))
    where = storage.join(uri, MARKER)
    if not storage.exists(where):
        raise ModelError(
            "not a finished bundle", where=uri, found="no config.json", way_out="train again, or give another bundle"
        )
    try:
        settings = storage.read_json(where)
        version = int(settings["xmc_ray_format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("not a bundle of xmc_ray", where=where, found=repr(error), expected="xmc_ray_format") from error
    expected = WITH_FIELDS if settings.get("fields") else FORMAT
    if version != expected:
        raise ModelError(
            "the bundle has another format",
            where=uri,
            found=f"format {version}",
            expected=f"format {expected}",
            way_out="upgrade xmc_ray" if version > expected else "train again, or use the release that wrote it",
        )
    own = {name: value for name, value in settings.items() if name not in ("files", "fingerprint")}
    if fingerprint_of(own, settings.get("files")) != settings.get("fingerprint"):  # before anything else in it is believed
        raise _damaged(where, _NO_MATCH)
    _check_files(uri, settings["files"])
    return dict(settings)


def fields_of(settings: dict[str, Any]) -> Fields:
    """The fields that a bundle reads, by its ``config.json``; none if it reads plain texts."""
    return tuple(Field(**field) for field in settings.get("fields", []))


def _verify(folder: Path, uri: str, fingerprint: str) -> folders.Stamps:
    settings = storage.read_json(folder / MARKER)
    files, found = settings.pop("files"), settings.pop("fingerprint")
    if found != fingerprint:
        raise ModelError(
            "the bundle has been replaced by another",
            where=uri,
            found=found,
            expected=fingerprint,
            way_out="put the bundle back, or run again with the one that is there now",
        )

    def check() -> None:
        damaged = [name for name, expected in files.items() if folders.digest(folder / name) != expected["sha256"]]
        if damaged or fingerprint_of(settings, files) != fingerprint:
            raise _damaged(storage.join(uri, *(damaged or [MARKER])[:1]), _NO_MATCH)

    return folders.check_once(folder, [MARKER, *files], fingerprint, check)


def _damaged(where: str, found: str, expected: str | None = None) -> ModelError:
    way_out = "copy the bundle again or train again"
    return ModelError("the bundle is damaged", where=where, found=found, expected=expected, way_out=way_out)


def fingerprint_of(settings: dict[str, Any], files: object) -> str:
    """16 hex digits of a ``config.json`` without the fingerprint itself; ``files``: size and digest of each of the others."""
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()[:16]


def _check_files(uri: str, files: dict[str, dict[str, Any]]) -> None:
    uri = storage.normalise(uri)
    sizes = {file.uri: file.size for file in storage.list_files(uri)}
    for name, expected in files.items():
        size = sizes.get(storage.join(uri, name))
        if size != expected["size"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise _damaged(storage.join(uri, name), found, f"{expected['size']} bytes")

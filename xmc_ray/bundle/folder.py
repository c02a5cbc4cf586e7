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

No pickle anywhere.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from jinja2 import Environment, PackageLoader

from xmc_ray import storage
from xmc_ray.data.fields import Field, Fields
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics.calibration import DEFAULT_PRECISION, Calibration
from xmc_ray.model.encoder import load_empty_encoder
from xmc_ray.model.lexical import LexicalBranch
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.linear import ARRAYS, LinearRanker
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.storage import folders

FORMAT = 4  # 1 to 3 were never released
_WITH_FIELDS = 5  # of a bundle with fields, which earlier releases would read as plain texts
_NO_MATCH = "a content that does not match its digest"

MARKER = "config.json"
WEIGHTS_FILE = "model.safetensors"
LABELS_FILE = "labels.parquet"
CALIBRATION_FILE = "calibration.parquet"
CALIBRATED_BY = "calibrated_by"  # in config.json: the arithmetic of the scores in that file; older bundles lack it


class MappedFile(NamedTuple):
    """A file that is mapped into memory: who writes into it changes what it holds there."""

    path: Path
    place: tuple[int, int]
    content: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "MappedFile":
        """As it is now."""
        state = path.stat()
        return cls(path, (state.st_dev, state.st_ino), (state.st_size, state.st_mtime_ns))

    def check(self) -> None:
        """Raises ModelError if somebody has written into it since; one that was removed or replaced stays mapped as it was."""
        with suppress(OSError):
            now = MappedFile.of(self.path)
            if now.place == self.place and now.content != self.content:
                raise ModelError(
                    "the bundle has been overwritten while it was in use",
                    where=self.path,
                    way_out="put the bundle back and run again; write another bundle to another folder",
                )


@dataclass
class Bundle:
    """A model with everything it needs to tag text. ``fingerprint``: 16 hex digits that depend on all its files.

    Without a ``calibration``, scores are those of the model. ``mapped``: the file that weights are read from as they are used.
    """

    model: LightXML
    tokenizer: Tokenizer
    labels: LabelIndex
    groups: LabelGroups
    metrics: dict[str, Any]
    run_toml: str = ""
    fingerprint: str = ""
    calibration: Calibration | None = None
    mapped: MappedFile | None = None


def save_bundle(bundle: Bundle, uri: str, confirm: Callable[[], None] = lambda: None) -> str:
    """Write a bundle, its marker last, and return its fingerprint. Raises ConfigError if there is something at ``uri``.

    ``confirm`` is called before the marker is written, and raises if another job has taken the place over. Raises ModelError
    if somebody has written into the file that the bundle's weights are mapped from.
    """
    uri = storage.normalise(uri)
    check_place(uri)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_parts(bundle, folder)
        if bundle.mapped is not None:
            bundle.mapped.check()
        files = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": folders.digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        settings = _settings(bundle)
        settings |= {"fingerprint": _fingerprint(settings, files), "files": files}
        (folder / MARKER).write_text(json.dumps(settings, indent=2) + "\n")
        folders.upload(folder, uri, last=MARKER, confirm=confirm)
    bundle.fingerprint = str(settings["fingerprint"])
    return bundle.fingerprint


def check_place(uri: str) -> None:
    """Raises ConfigError if there is something at ``uri``, where a bundle is to be written."""
    if not storage.is_empty(uri):
        raise ConfigError("the place for the bundle is not empty", where=uri, way_out="choose another place or remove it")


def changes(extension: dict[str, Any]) -> str:
    """What ``metrics["extension"]`` counts, in words."""
    return ", ".join(f"{count:,} {what}" for what, count in extension.items() if isinstance(count, int))


def load_bundle(uri: str, fingerprint: str | None = None) -> Bundle:
    """Open a bundle on the CPU. Raises ModelError when it is not one, is damaged, has another format or ``fingerprint``.

    The weights are memory-mapped: all processes of a machine share the file's pages, and one that changes a weight gets a copy
    of that page. A bundle on S3 is downloaded once per machine; see `folders.node_copy`.
    """
    uri = storage.normalise(uri)
    settings = read_settings(uri)
    with local_bundle(uri, fingerprint or settings["fingerprint"]) as folder:
        return _open(folder, uri)


def _open(folder: Path, uri: str) -> Bundle:
    settings, weights = storage.read_json(folder / MARKER), folder / WEIGHTS_FILE
    mapped = MappedFile.of(weights)
    table = pq.read_table(folder / LABELS_FILE)
    groups = LabelGroups(table["group"].to_numpy().astype(np.int64))
    encoder = load_empty_encoder(folder / "encoder", **settings["encoder"]) if settings["encoder"] else None
    state = safetensors.torch.load_file(weights)
    fields = fields_of(settings)
    lexical = None
    with torch.device("meta"):  # shapes without memory
        if settings["lexical"]:
            field_weights = [field.weight for field in fields]
            lexical = LexicalBranch(state["lexical.weight_F"], settings["lexical"]["width"], field_weights)
        model = LightXML(encoder, groups, ModelConfig(**settings["model"]), lexical=lexical)
    if settings.get("linear"):  # bundles of before it was there have none
        start_L1, column_W, weight_W, bias_L = (state[f"linear.{name}"] for name in ARRAYS)
        model.linear = LinearRanker(start_L1, column_W, weight_W, bias_L, **settings["linear"])
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise ModelError("the weights are not those of the bundle's settings", where=uri, found=found) from error
    labels = LabelIndex.from_table(table)
    return Bundle(
        model=model.eval(),
        tokenizer=Tokenizer.load(folder, settings["max_tokens"], fields),
        labels=labels,
        groups=groups,
        metrics=json.loads((folder / "metrics.json").read_text()),
        run_toml=(folder / "run.toml").read_text(),
        fingerprint=settings["fingerprint"],
        calibration=read_calibration(folder, labels),
        mapped=mapped,
    )


@contextmanager
def local_bundle(uri: str, fingerprint: str) -> Iterator[Path]:
    """The local folder of a bundle, for a body that reads it.

    It is verified by its digests: a download once, a folder on this machine whenever its files have been touched. Raises
    ModelError if it is another bundle than that of ``fingerprint``, or damaged, or if it has changed when the body ends.
    """
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
    expected = _WITH_FIELDS if settings.get("fields") else FORMAT
    if version != expected:
        raise ModelError(
            "the bundle has another format",
            where=uri,
            found=f"format {version}",
            expected=f"format {expected}",
            way_out="upgrade xmc_ray" if version > expected else "train again, or use the release that wrote it",
        )
    own = {name: value for name, value in settings.items() if name not in ("files", "fingerprint")}
    if _fingerprint(own, settings.get("files")) != settings.get("fingerprint"):  # before anything else in it is believed
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
        if damaged or _fingerprint(settings, files) != fingerprint:
            raise _damaged(storage.join(uri, *(damaged or [MARKER])[:1]), _NO_MATCH)

    return folders.check_once(folder, [MARKER, *files], fingerprint, check)


def _damaged(where: str, found: str, expected: str | None = None) -> ModelError:
    way_out = "copy the bundle again or train again"
    return ModelError("the bundle is damaged", where=where, found=found, expected=expected, way_out=way_out)


def _fingerprint(settings: dict[str, Any], files: object) -> str:
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()[:16]


def _write_parts(bundle: Bundle, folder: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in bundle.model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
    if bundle.model.encoder is not None:
        bundle.model.encoder.settings.save_pretrained(folder / "encoder")
    bundle.tokenizer.save(folder)
    table = bundle.labels.to_table()
    table = table.append_column("group", pa.array(bundle.groups.group_L))
    calibration, thresholds = bundle.calibration, pa.nulls(len(table), pa.float32())
    if calibration is not None:
        thresholds = pa.array(calibration.thresholds(DEFAULT_PRECISION))
        pq.write_table(calibration.to_table(bundle.labels.fingerprint), folder / CALIBRATION_FILE)
    table = table.append_column("threshold", thresholds)
    pq.write_table(table, folder / LABELS_FILE)
    (folder / "metrics.json").write_text(json.dumps(bundle.metrics, indent=2) + "\n")
    (folder / "run.toml").write_text(bundle.run_toml)
    (folder / "README.md").write_text(_card(bundle))


def _settings(bundle: Bundle) -> dict[str, Any]:
    encoder, lexical, linear = bundle.model.encoder, bundle.model.lexical, bundle.model.linear
    read = ("feature_layers", "pooling", "max_tokens")
    fields = [field._asdict() for field in bundle.tokenizer.fields]
    return {
        "xmc_ray_format": _WITH_FIELDS if fields else FORMAT,
        "labels": len(bundle.labels),
        "groups": len(bundle.groups),
        "label_fingerprint": bundle.labels.fingerprint,
        "max_tokens": bundle.tokenizer.max_tokens,
        "encoder": None if encoder is None else {name: getattr(encoder, name) for name in read},
        "lexical": None if lexical is None else {"columns": len(lexical.weight_F), "width": lexical.width},
        "linear": None if linear is None else {"candidates": linear.candidates, "weight": linear.weight},
        "model": dataclasses.asdict(bundle.model.config),
        CALIBRATED_BY: None if bundle.calibration is None else bundle.calibration.arithmetic,
        **({"fields": fields} if fields else {}),
        **({"feedback": bundle.metrics["feedback"]} if "feedback" in bundle.metrics else {}),
    }


def _check_files(uri: str, files: dict[str, dict[str, Any]]) -> None:
    uri = storage.normalise(uri)
    sizes = {file.uri: file.size for file in storage.list_files(uri)}
    for name, expected in files.items():
        size = sizes.get(storage.join(uri, name))
        if size != expected["size"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise _damaged(storage.join(uri, name), found, f"{expected['size']} bytes")


def _card(bundle: Bundle) -> str:
    loader = PackageLoader("xmc_ray.bundle")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template("card.md.j2").render(
        bundle=bundle,
        encoder=bundle.model.encoder,
        lexical=bundle.model.lexical,
        longest=bundle.tokenizer.max_tokens,
        weights=sum(parameter.numel() for parameter in bundle.model.parameters()),
        linear=bundle.model.linear,
        changes=changes,
    )

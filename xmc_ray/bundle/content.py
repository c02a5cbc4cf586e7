"""What a bundle holds, read from its `folder` and written to it."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from jinja2 import Environment, PackageLoader

from xmc_ray import storage
from xmc_ray.bundle.folder import (
    CALIBRATED_BY,
    CALIBRATION_FILE,
    FORMAT,
    LABELS_FILE,
    MARKER,
    WEIGHTS_FILE,
    WITH_FIELDS,
    fields_of,
    fingerprint_of,
    local_bundle,
    read_calibration,
    read_settings,
)
from xmc_ray.bundle.hub import pinned
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


def save_bundle(
    bundle: Bundle, uri: str, confirm: Callable[[], None] = lambda: None, about: Mapping[str, object] = MappingProxyType({})
) -> str:
    """Write a bundle, its marker last, and return its fingerprint. Raises ConfigError if there is something at ``uri``.

    ``about``: further entries of the model card's head, such as ``license``; a card is part of the bundle.
    ``confirm`` is called before the marker is written, and raises if another job has taken the place over. Raises ModelError
    if somebody has written into the file that the bundle's weights are mapped from.
    """
    uri = storage.normalise(uri)
    check_place(uri)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_parts(bundle, folder, about)
        if bundle.mapped is not None:
            bundle.mapped.check()
        files = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": folders.digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        settings = _settings(bundle)
        settings |= {"fingerprint": fingerprint_of(settings, files), "files": files}
        (folder / MARKER).write_text(json.dumps(settings, indent=2) + "\n")
        folders.upload(folder, uri, last=MARKER, confirm=confirm)
    bundle.fingerprint = str(settings["fingerprint"])
    return bundle.fingerprint


def check_place(uri: str) -> None:
    """Raises ConfigError if there is something at ``uri``, where a bundle is to be written."""
    if storage.is_empty(uri):
        return
    found = None if storage.exists(storage.join(uri, MARKER)) else f"files, but no {MARKER}, which a bundle gets last"
    raise ConfigError(
        "the place for the bundle is not empty", where=uri, found=found, way_out="choose another place or remove it"
    )


def changes(extension: dict[str, Any]) -> str:
    """What ``metrics["extension"]`` counts, in words."""
    return ", ".join(f"{count:,} {what}" for what, count in extension.items() if isinstance(count, int))


def load_bundle(uri: str, fingerprint: str | None = None) -> Bundle:
    """Open a bundle on the CPU. Raises ModelError when it is not one, is damaged, has another format or ``fingerprint``.

    The weights are memory-mapped: all processes of a machine share the file's pages, and one that changes a weight gets a copy
    of that page. A bundle on S3 is downloaded once per machine; see `folders.node_copy`.
    """
    uri = pinned(storage.normalise(uri))
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
        tokenizer=Tokenizer.of_bundle(folder, settings["max_tokens"], fields),
        labels=labels,
        groups=groups,
        metrics=json.loads((folder / "metrics.json").read_text()),
        run_toml=(folder / "run.toml").read_text(),
        fingerprint=settings["fingerprint"],
        calibration=read_calibration(folder, labels),
        mapped=mapped,
    )


def _write_parts(bundle: Bundle, folder: Path, about: Mapping[str, object]) -> None:
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
    (folder / "README.md").write_text(_card(bundle, about))


def _settings(bundle: Bundle) -> dict[str, Any]:
    encoder, lexical, linear = bundle.model.encoder, bundle.model.lexical, bundle.model.linear
    read = ("feature_layers", "pooling", "max_tokens")
    fields = [field._asdict() for field in bundle.tokenizer.fields]
    return {
        "xmc_ray_format": WITH_FIELDS if fields else FORMAT,
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


def _card(bundle: Bundle, about: Mapping[str, object]) -> str:
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
        about=about,
    )

"""Bundles: what is read back is what was written, and nothing half-written is taken for whole."""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from seaweed import S3

from xmc_ray import storage
from xmc_ray.bundle import content
from xmc_ray.bundle.content import Bundle, load_bundle, save_bundle
from xmc_ray.bundle.folder import fingerprint_of, read_settings
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError, ModelError, XmcError
from xmc_ray.metrics.calibration import Calibration
from xmc_ray.model.encoder import EncoderConfig, build_encoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.storage import files, folders

TEXTS = pa.array(["a red apple", "the green pear and a plum", "grape"])


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies from S3 go to this folder, in this process and in those it starts."""
    folder: Path = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def make_bundle(tiny_encoder: Path, n_groups: int = 3) -> Bundle:
    torch.manual_seed(0)
    labels = LabelIndex.count([pa.array([[f"label {n}" for n in range(7)][: n + 1] for n in range(7)])])
    labels = labels.with_names(pa.table({"label": ["label 1"], "name": ["The one"]}))
    tokenizer = Tokenizer.load(tiny_encoder, 24)
    encoder = build_encoder(EncoderConfig(name=str(tiny_encoder), layers=1, feature_layers=2, pooling="mean"), tokenizer)
    groups = LabelGroups(np.arange(7) % n_groups)
    model = LightXML(encoder, groups, ModelConfig(shortlist=2, bottleneck=16, lift=1.0))
    model.start_from_counts(labels.counts, labels.n_documents)
    return Bundle(model, tokenizer, labels, groups, metrics={"P@1": 0.5}, run_toml="[loop]\nepochs = 1\n")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "bundle")
    s3: S3 = request.getfixturevalue("s3")
    return s3.uri(f"bundles/{tmp_path.name}")


@pytest.mark.parametrize("n_groups", [3, 7])
def test_round_trip(tiny_encoder: Path, place: str, n_groups: int) -> None:
    bundle = make_bundle(tiny_encoder, n_groups)
    fingerprint = save_bundle(bundle, place)
    again = load_bundle(place)
    assert again.fingerprint == fingerprint == bundle.fingerprint
    assert again.labels.to_table().equals(bundle.labels.to_table())
    assert (again.metrics, again.run_toml) == (bundle.metrics, bundle.run_toml)
    results = [predict(part.model, part.tokenizer.encode(TEXTS)[0], 4, PredictConfig()) for part in (bundle, again)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_calibration_of_a_bundle_comes_back(tiny_encoder: Path, tmp_path: Path) -> None:
    plain, bundle = make_bundle(tiny_encoder), make_bundle(tiny_encoder)
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 3)).astype(np.float32), np.argsort(rng.random((200, 7)), axis=1)[:, :3]
    bundle.calibration = Calibration.of(
        scores, labels, rng.random(scores.shape) < scores, bundle.labels.counts, "cuda bfloat16"
    )
    places = [str(tmp_path / name) for name in ("plain", "calibrated")]
    assert save_bundle(plain, places[0]) != save_bundle(bundle, places[1])
    assert load_bundle(places[0]).calibration is None and "calibration.parquet" not in read_settings(places[0])["files"]
    again = load_bundle(places[1]).calibration
    assert again is not None and "calibration.parquet" in read_settings(places[1])["files"]
    assert again.arithmetic == "cuda bfloat16"
    np.testing.assert_array_equal(again.calibrated(scores, labels), bundle.calibration.calibrated(scores, labels))
    column = [pq.read_table(f"{place}/labels.parquet")["threshold"] for place in places]
    assert column[0].null_count == 7 and np.array_equal(column[1].to_numpy(), again.thresholds(0.5))


def test_a_bundle_from_before_arithmetics_were_recorded_opens(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tiny_encoder)
    scores, labels = np.full((9, 1), 0.5, np.float32), np.zeros((9, 1), np.int64)
    bundle.calibration = Calibration.of(scores, labels, scores > 0, bundle.labels.counts, "cpu float32")
    save_bundle(bundle, str(tmp_path / "old"))
    settings = json.loads((tmp_path / "old" / "config.json").read_text())
    parts = {name: settings[name] for name in settings if name not in ("calibrated_by", "files", "fingerprint")}
    older = parts | {"fingerprint": fingerprint_of(parts, settings["files"]), "files": settings["files"]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(older))
    calibration = load_bundle(str(tmp_path / "old")).calibration
    assert calibration is not None and calibration.arithmetic is None and len(calibration) == 9


def test_weights_are_the_mapped_file_until_they_change(tiny_encoder: Path, tmp_path: Path) -> None:
    save_bundle(make_bundle(tiny_encoder), str(tmp_path / "bundle"))
    one, other = (load_bundle(str(tmp_path / "bundle")).model for _ in range(2))
    assert not [name for name, tensor in [*one.named_parameters(), *one.named_buffers()] if tensor.device.type != "cpu"]
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, _ in one.named_parameters() if not name.startswith(("recall.", "table."))]
    weights, maps = str(tmp_path / "bundle" / "model.safetensors"), Path("/proc/self/maps")
    if maps.exists():  # on Linux; all of a model's weights lie in one mapping
        assert maps.read_text().count(weights) == 2
    digest = folders.digest(weights)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    for changed, kept in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(changed, kept + 1)
    assert folders.digest(weights) == digest


def copied(folder: Path) -> list[str]:
    """The finished and unfinished copies in a temporary folder."""
    return sorted(path.name for home in folder.glob("xmc_ray-*") for path in home.iterdir() if path.is_dir())


def open_bundle(task: tuple[str, bool]) -> tuple[int, str]:
    """In a process of its own: how often a bundle is downloaded there, and where its weights lie; or a death on the way."""
    uri, dies = task
    filesystem = storage.filesystem(uri)[0]
    download, files = filesystem.get_file, []

    def watched(*args: Any, **kwargs: Any) -> None:
        files.append(args)
        if dies and len(files) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        download(*args, **kwargs)

    with mock.patch.object(filesystem, "get_file", watched):
        bundle = load_bundle(uri)  # noqa: F841  # it holds the mapping
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")}
    return len(files), str(mapped)


def test_processes_share_one_copy_of_a_bundle_on_s3(tiny_encoder: Path, s3: S3, temporary: Path) -> None:
    uri = s3.uri("bundles/shared")
    fingerprint = save_bundle(make_bundle(tiny_encoder), uri)
    spawn = multiprocessing.get_context("spawn")
    killed = spawn.Process(target=open_bundle, args=((uri, True),))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert copied(temporary) == [f"{fingerprint}.part"]

    with spawn.Pool(2) as pool:
        (one, mapped), (other, same) = pool.map(open_bundle, [(uri, False)] * 2, chunksize=1)
    assert sorted([one, other]) == [0, len(storage.all_files(uri))], "downloaded by one of them"
    assert mapped == same != "set()"
    assert copied(temporary) == [fingerprint]


def test_a_copy_that_lost_a_file_is_made_again_and_one_that_is_not_used_makes_room(
    tiny_encoder: Path, s3: S3, temporary: Path
) -> None:
    bundle, uris = make_bundle(tiny_encoder), [s3.uri(f"bundles/{name}") for name in ("first", "second")]
    first = save_bundle(bundle, uris[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.map(open_bundle, [(uris[0], False)])
    assert copied(temporary) == [first]
    with torch.no_grad():
        bundle.model.recall.bias[0] += 1
    second = save_bundle(bundle, uris[1])
    (folders.node_copy(uris[1], second) / "labels.parquet").unlink()
    assert copied(temporary) == [second]
    load_bundle(uris[1])
    load_bundle(uris[0])
    assert copied(temporary) == sorted([first, second]), "this process holds both"


def test_a_bundle_is_files_that_others_can_open(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    save_bundle(make_bundle(tiny_encoder), str(tmp_path / "bundle"))
    names = {str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "encoder/config.json", "tokenizer.json", "labels.parquet"} <= names
    assert {"metrics.json", "run.toml", "README.md"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pkl", ".bin"))]
    with safe_open(tmp_path / "bundle" / "model.safetensors", "pt") as weights:
        assert {"table.weight", "table.bias", "recall.weight"} <= set(weights.keys())
    assert AutoConfig.from_pretrained(tmp_path / "bundle" / "encoder").num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "bundle")("a red apple")["input_ids"]


def test_fingerprint_changes_with_the_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tiny_encoder)
    one, same = save_bundle(bundle, str(tmp_path / "one")), save_bundle(bundle, str(tmp_path / "same"))
    with torch.no_grad():
        bundle.model.recall.bias[0] += 1e-3
    assert one == same != save_bundle(bundle, str(tmp_path / "other"))


def test_no_bundle_is_written_over_anything(tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        save_bundle(make_bundle(tiny_encoder), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_files_of_others_in_a_bundle_are_not_taken_for_its_own(tiny_encoder: Path, tmp_path: Path) -> None:
    """C9: string tests on whole addresses, here on how they end."""
    fingerprint = save_bundle(make_bundle(tiny_encoder), str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "labels.parquet").write_text("mine")
    assert load_bundle(f"file://{tmp_path}/a/..").fingerprint == fingerprint


def damage_marker(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_labels(folder: Path) -> None:
    (folder / "labels.parquet").unlink()


def lose_lift(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["model"]["lift"] = 0.0  # the weights still have one
    files = settings.pop("files")
    del settings["fingerprint"]
    settings |= {"fingerprint": fingerprint_of(settings, files), "files": files}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_marker, "not a finished bundle"),
        (damage_weights, "model.safetensors"),
        (lose_labels, "labels.parquet"),
        (lose_lift, "recall.lift"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(damage, told: str, tiny_encoder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_bundle(make_bundle(tiny_encoder), str(tmp_path / "bundle"))
    damage(tmp_path / "bundle")
    with pytest.raises(XmcError) as caught:
        load_bundle(str(tmp_path / "bundle"))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changed_bytes_are_found_by_their_digest(tiny_encoder: Path, place: str, tmp_path: Path) -> None:
    save_bundle(make_bundle(tiny_encoder), place)
    weights = storage.join(place, "model.safetensors")
    content = storage.read_bytes(weights)
    storage.write_bytes(weights, content[:-64] + bytes(byte ^ 0xFF for byte in content[-64:]))
    with pytest.raises(ModelError, match=r"the bundle is damaged: .*model\.safetensors; found a content that does not match"):
        load_bundle(place)
    storage.write_bytes(weights, content)
    settings = storage.read_json(storage.join(place, "config.json"))
    storage.write_json(storage.join(place, "config.json"), settings | {"max_tokens": 5})
    with pytest.raises(ModelError, match=r"the bundle is damaged: .*config\.json"):
        load_bundle(place)


def test_another_bundle_at_the_same_address_is_not_opened(tiny_encoder: Path, place: str) -> None:
    first = save_bundle(make_bundle(tiny_encoder), place)
    assert load_bundle(place, first).fingerprint == first
    storage.remove(place)
    second = save_bundle(make_bundle(tiny_encoder, n_groups=7), place)
    with pytest.raises(ModelError, match=f"has been replaced by another: {place}; found {second}; expected {first}"):
        load_bundle(place, first)


def test_settings_and_weights_are_of_one_bundle(tiny_encoder: Path, s3: S3) -> None:
    """Kind: an address that is resolved again. A bundle whose files have the same sizes replaces one that was downloaded."""
    bundle, place = make_bundle(tiny_encoder), s3.uri("bundles/swapped")
    first, bias = save_bundle(bundle, place), bundle.model.recall.bias.clone()
    load_bundle(place)
    storage.remove(place)
    with torch.no_grad():
        bundle.model.recall.bias += 1
    assert save_bundle(bundle, place) != first
    again = load_bundle(place, first)
    assert again.fingerprint == first and torch.equal(again.model.recall.bias, bias)
    assert torch.equal(load_bundle(place).model.recall.bias, bias + 1)


def test_a_bundle_that_changes_while_it_is_opened(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: check, then use. The digests hold, and then another bundle is put there."""
    for number in (3, 7):
        save_bundle(make_bundle(tiny_encoder, number), str(tmp_path / str(number)))
    load_file = content.safetensors.torch.load_file

    def swapped(weights: Path) -> Any:
        shutil.rmtree(tmp_path / "3")
        shutil.copytree(tmp_path / "7", tmp_path / "3")
        return load_file(weights)

    monkeypatch.setattr(content.safetensors.torch, "load_file", swapped)
    with pytest.raises(ModelError, match=rf"the bundle has changed while it was read: {tmp_path / '3'}; run again"):
        load_bundle(str(tmp_path / "3"))


def test_a_local_bundle_is_hashed_once_until_it_is_touched(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every actor of a machine would else read all weights; one that was touched since is never trusted."""
    place, weights, digested = str(tmp_path / "bundle"), tmp_path / "bundle" / "model.safetensors", list[str]()
    fingerprint = save_bundle(make_bundle(tiny_encoder), place)
    digest = folders.digest
    monkeypatch.setattr(folders, "digest", lambda path: digested.append(path.name) or digest(path))
    load_bundle(place, fingerprint)
    load_bundle(place, fingerprint)
    assert digested.count("model.safetensors") == 2, "too fresh to tell whether it is still the same"
    monkeypatch.setattr(folders, "_SETTLED", 0)
    load_bundle(place, fingerprint)
    assert digested.count("model.safetensors") == 3
    load_bundle(place, fingerprint)
    assert digested.count("model.safetensors") == 3
    time.sleep(0.05)
    kept, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    os.utime(weights, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(ModelError, match="the bundle is damaged"):
            load_bundle(place, fingerprint)


def test_an_upload_that_breaks_off_leaves_no_bundle(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []
    copy = shutil.copyfile

    def break_off(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise OSError("no space left on device")
        copied.append(source)
        copy(source, target)

    monkeypatch.setattr(files.shutil, "copyfile", break_off)
    with pytest.raises(ConfigError, match="no space left"):
        save_bundle(make_bundle(tiny_encoder), str(tmp_path / "bundle"))
    with pytest.raises(ModelError, match="not a finished bundle"):
        load_bundle(str(tmp_path / "bundle"))

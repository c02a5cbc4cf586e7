"""Checkpoints: written in shards, taken up by any number of workers, never mistaken for complete when they are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import OPTIM, documents, on_workers, toy_model, whole_parameters

from xmc_ray import storage
from xmc_ray.data.groups import LabelGroups
from xmc_ray.errors import DataError, ModelError, UnavailableError, XmcError
from xmc_ray.model.sharding import Exchange
from xmc_ray.storage import files, folders
from xmc_ray.training import checkpoint
from xmc_ray.training.checkpoint import MARKER, Checkpoints, CheckpointsConfig, best, find, restore
from xmc_ray.training.fit import epoch_plan, share_of_batches
from xmc_ray.training.loop import LoopConfig, TrainState, data_parallel, train
from xmc_ray.training.optim import OptimConfig

LOOP = LoopConfig(epochs=4, batch_size=16)  # 4 steps an epoch, the documents' last batch is a short one
AVERAGED = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04, swa_start=0.3, swa_every=2)
IDENTITY = {"labels": "abc"}
STEPS = CheckpointsConfig(steps=3, keep_last=2)


def fresh(exchange: Exchange | None = None, **settings: Any) -> TrainState:
    return TrainState.start(toy_model(exchange=exchange, lexical=True, **settings), AVERAGED)


def advance(state: TrainState, until: int, checkpoints: Checkpoints | None = None) -> list[float]:
    """Train to step ``until`` and return the losses; checkpoints are saved when they are due."""
    table, losses = documents(61), []
    plan = epoch_plan(LOOP, len(table))
    shares: Callable[[int], Any] = lambda first: share_of_batches(table, plan, LOOP.epochs, first, state.model.exchange)  # noqa: E731
    for step in train(state, data_parallel(state.model), shares, plan.steps, LOOP):
        losses.append(step.loss)
        if checkpoints is not None and checkpoints.due(state):
            checkpoints.save(state, score=1 / step.number)
        if step.number == until:
            break
    if checkpoints is not None:
        checkpoints.wait()
    return losses


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All that a checkpoint must bring back."""
    accumulators = {f"{name}.square": square for name, square in state.optimizer.rows.square.items()}
    averaged = {f"averaged.{name}": tensor for name, tensor in state.averager.averaged.items()}
    counters = {name: torch.tensor(float(getattr(state, name))) for name in ("step", "documents", "tokens", "padded_tokens")}
    lift = {} if state.model.recall.lift is None else {"lift": state.model.recall.lift}
    return dict(state.model.named_parameters()) | lift | accumulators | averaged | state.optimizer.dense_state() | counters


def test_a_resumed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, ended, resumed = (fresh(dropout=0.2, lift=1.0) for _ in range(3))
    for state in (undisturbed, ended):
        state.model.start_from_counts(np.arange(12) * 5, 61)
    losses = advance(undisturbed, 16)
    saving, again = (Checkpoints(str(tmp_path), STEPS, IDENTITY) for _ in range(2))
    advance(ended, 11, saving)  # the newest checkpoint is that of step 9, in the middle of an epoch
    saved = again.resume(resumed, pytest.fail)
    assert saved is not None and saved.step == resumed.step == 9
    assert advance(resumed, 16) == losses[9:]
    expected = everything(undisturbed)
    for name, tensor in everything(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    assert resumed.averager.count == undisturbed.averager.count > 1


def train_in_parts(exchange: Exchange, folder: str, until: int) -> dict[str, Any]:
    state, checkpoints = fresh(exchange, lift=1.0), Checkpoints(folder, STEPS, IDENTITY)
    saved = checkpoints.resume(state, lambda line: None)
    if saved is None:
        state.model.start_from_counts(np.arange(12) * 5, 61)
    advance(state, until, checkpoints)
    found = None if saved is None else (saved.step, saved.workers)
    parameters = {name: tensor.detach() for name, tensor in state.model.state_dict().items()}  # and the lift
    averaged = {f"{name}": tensor for name, tensor in state.averager.averaged.items()}
    return {"parameters": parameters, "averaged": averaged, "found": found}


def test_two_workers_then_three_then_one(tmp_path: Path) -> None:
    undisturbed = fresh(lift=1.0)
    undisturbed.model.start_from_counts(np.arange(12) * 5, 61)
    advance(undisturbed, 16)
    place = str(tmp_path / "checkpoints")
    for world, until in ((2, 7), (3, 11)):
        (tmp_path / f"{world}").mkdir()
        results = on_workers([world], train_in_parts, tmp_path / f"{world}", place, until)[world]
    assert {result["found"] for result in results} == {(6, 2)}
    alone = train_in_parts(Exchange(), place, 16)
    assert alone["found"] == (9, 3)
    torch.testing.assert_close(alone["parameters"]["recall.lift"], undisturbed.model.recall.lift, rtol=0, atol=0)
    for name, parameter in undisturbed.model.named_parameters():
        torch.testing.assert_close(alone["parameters"][name], parameter.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone["averaged"][name], undisturbed.averager.averaged[name], rtol=1e-5, atol=1e-5)


def test_every_worker_writes_its_own_rows_and_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    place = str(tmp_path / "checkpoints")
    results = on_workers([2], train_in_parts, tmp_path, place, 3)[2]
    (saved,) = find(place, pytest.fail)
    parts = [load_file(Path(saved.uri) / f"rows-{rank:05}-of-00002.safetensors") for rank in range(2)]
    whole = whole_parameters([result["parameters"] for result in results])
    for name in ("recall.weight", "recall.lift", "table.weight", "table.bias"):
        assert [len(part[f"model.{name}"]) for part in parts] == [3, 4]
        torch.testing.assert_close(torch.cat([part[f"model.{name}"] for part in parts]), whole[name], rtol=0, atol=0)
    shared = load_file(Path(saved.uri) / checkpoint.DENSE)
    assert not any(name.startswith(("model.recall", "model.table")) for name in shared)
    assert "optimizer.encoder.vectors.weight.exp_avg" in shared and "optimizer.bottleneck.weight.exp_avg_sq" in shared


def saved_at(place: Path, *steps: int, scores: tuple[float | None, ...] = ()) -> TrainState:
    """A state whose checkpoints of ``steps`` lie at ``place``."""
    checkpoints, state = Checkpoints(str(place), CheckpointsConfig(keep_last=9), IDENTITY), fresh()
    for step, score in zip(steps, scores or (None,) * len(steps), strict=True):
        advance(state, step)
        checkpoints.save(state, score)
    checkpoints.wait()
    return state


def test_a_folder_cut_short_is_passed_over_by_name(tmp_path: Path) -> None:
    saved_at(tmp_path, 2, 4, 6, 8)
    newest, second, third, fourth = (Path(entry.uri) for entry in find(str(tmp_path), pytest.fail))
    (newest / MARKER).unlink()
    rows = second / "rows-00000-of-00001.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1])
    (third / MARKER).write_text('{"half a')
    told: list[str] = []
    assert [entry.uri for entry in find(str(tmp_path), told.append)] == [str(fourth)]
    for line, folder, why in zip(
        told, (newest, second, third), ("unfinished", "cut short, rows", "cannot be read"), strict=True
    ):
        assert line.startswith("warning: ") and str(folder) in line and why in line
    (fourth / checkpoint.DENSE).unlink()
    assert find(str(tmp_path)) == []

    state = fresh()
    assert Checkpoints(str(tmp_path), STEPS, IDENTITY).resume(state, told.append) is None
    assert state.step == 0 and storage.is_empty(tmp_path), "what was left of them would mix with what is saved next"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    config, state = CheckpointsConfig(keep_last=2), fresh()
    checkpoints = Checkpoints(str(tmp_path), config, IDENTITY)
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.2), (5, 0.3)):
        advance(state, step)
        checkpoints.save(state, score, {"P@1": 0.5})
    checkpoints.wait()
    kept = find(str(tmp_path), pytest.fail)
    assert [entry.step for entry in kept] == [5, 4, 2]
    assert [entry.step for entry in best(kept)] == [2] and best(kept)[0].metrics == {"P@1": 0.5}


def test_due_by_steps_and_by_the_shared_clock() -> None:
    state = fresh()
    by_step = Checkpoints("unused", CheckpointsConfig(steps=4, minutes=1000), IDENTITY)
    by_time = Checkpoints("unused", CheckpointsConfig(minutes=2), IDENTITY)
    by_time.saved_at = 60.0
    for state.step, state.seconds, expected in ((3, 0.0, [False, False]), (4, 179.9, [True, False]), (5, 180.0, [False, True])):
        assert [checkpoints.due(state) for checkpoints in (by_step, by_time)] == expected
    often = Checkpoints("unused", CheckpointsConfig(minutes=0.1), IDENTITY)
    for state.seconds, expected in ((5.9, [False, False]), (14.9, [False, True]), (60.0 + 15, [True, True])):
        assert [checkpoints.due(state, hurry=True) for checkpoints in (by_time, often)] == expected


def test_training_goes_on_while_the_copy_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    upload, may_go_on = folders.upload, threading.Event()
    monkeypatch.setattr(folders, "upload", lambda *args: (may_go_on.wait(30), upload(*args)))
    state, checkpoints = fresh(), Checkpoints(str(tmp_path), STEPS, IDENTITY)
    advance(state, 3)
    saved = {name: tensor.detach().clone() for name, tensor in state.model.named_parameters()}
    checkpoints.save(state)
    advance(state, 7)
    assert find(str(tmp_path)) == []
    may_go_on.set()
    checkpoints.wait()
    restore(state, find(str(tmp_path))[0])
    assert state.step == 3
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter, saved[name], rtol=0, atol=0)


def test_a_storage_that_comes_back_is_waited_for_and_one_that_does_not_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, calls = folders.upload, []

    def away(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            raise UnavailableError("cannot be read or written", where="there")
        upload(*arguments)

    monkeypatch.setattr(folders, "upload", away)
    state = fresh()
    advance(state, 1)
    patient = Checkpoints(str(tmp_path), CheckpointsConfig(), IDENTITY)
    patient.save(state)
    patient.wait()
    assert len(find(str(tmp_path), pytest.fail)) == 1 and len(calls) == 3
    monkeypatch.setattr(folders, "upload", lambda *arguments: away())
    calls.clear()
    monkeypatch.setattr(files, "PATIENCE", 0)
    impatient = Checkpoints(str(tmp_path), CheckpointsConfig(), IDENTITY)
    impatient.save(state)
    with pytest.raises(XmcError, match="cannot be read or written"):
        impatient.save(state)


def test_the_first_worker_waits_for_the_files_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than storage is waited for, and it is told whose file is missing."""
    (tmp_path / "mine").write_bytes(b"12")

    def arrive(_: float) -> None:
        (tmp_path / "theirs").write_bytes(b"345")

    with pytest.raises(DataError, match=r"not complete: .*found no theirs"):
        checkpoint._await_files(str(tmp_path), {"mine", "theirs"}, seconds=0)
    monkeypatch.setattr(checkpoint.time, "sleep", arrive)
    assert checkpoint._await_files(str(tmp_path), {"mine", "theirs"}, seconds=60) == {"mine": 2, "theirs": 3}


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another label set": (lambda marker: marker["identity"].update(labels="xyz"), "other labels.*xyz.*abc"),
    "an earlier format": (
        lambda marker: marker.update(xmc_ray_checkpoint=1),
        "earlier format.*found 1; expected 3; resume with",
    ),
    "a newer format": (lambda marker: marker.update(xmc_ray_checkpoint=99), "newer format.*99.*upgrade"),
}


@pytest.mark.parametrize("case", BAD)
def test_checkpoints_that_do_not_fit(case: str, tmp_path: Path) -> None:
    change, told = BAD[case]
    saved_at(tmp_path, 2)
    marker = tmp_path / "step-000000002" / MARKER
    content = json.loads(marker.read_text())
    change(content)
    marker.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=told):
        Checkpoints(str(tmp_path), STEPS, IDENTITY).resume(fresh(), pytest.fail)


def test_another_model_shape_is_named(tmp_path: Path) -> None:
    saved_at(tmp_path, 2)
    (saved,) = find(str(tmp_path))
    other = TrainState.start(toy_model(LabelGroups(np.arange(12) % 7), bottleneck=16), OPTIM)
    with pytest.raises(ModelError, match=r"another model: .*bottleneck"):
        restore(other, saved)


def test_a_folder_of_checkpoints_may_have_any_name(tmp_path: Path) -> None:
    """C9: string tests on whole addresses."""
    saved_at(tmp_path / "last-step-3", 2, 4)
    assert [saved.step for saved in find(str(tmp_path / "last-step-3"), pytest.fail)] == [4, 2]


def test_a_checkpoint_can_be_given_by_its_own_address(tmp_path: Path) -> None:
    saved_at(tmp_path, 2, 4)
    (saved,) = find(str(tmp_path / "step-000000002"), pytest.fail)
    assert saved.step == 2
    state = fresh()
    restore(state, saved)
    assert state.step == 2

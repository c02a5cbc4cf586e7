"""Training under kill -9, with real processes: no fault costs more than the steps since the last checkpoint.

The order of the documents is kept in all of these, so the final parameters are those of a run that nothing happens to.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SECONDS, children, kill, running, submit, wait_for
from fruit import options
from safetensors.torch import load_file
from seaweed import S3

from xmc_ray import command, storage
from xmc_ray.on_ray.train import job
from xmc_ray.storage import folders
from xmc_ray.training.checkpoint import MARKER, find

pytestmark = pytest.mark.usefixtures("ray_session")

SETTINGS = [
    "--workers.count=2",
    "--loop.epochs=10",
    "--validation.every=1000",
    "--checkpoints.steps=20",
    "--checkpoints.keep_last=3",
    "--optim.swa_start=0.5",
]


@pytest.fixture(scope="module")
def settings(fruit: Path, tiny_encoder: Path, s3: S3) -> Callable[[object], list[str]]:
    """The options of a run at an address; all share their tokens, so all see the same documents in the same order."""
    cache = s3.uri("faults/tokens")
    return lambda output: options(fruit, tiny_encoder, output, *SETTINGS, f"--cache={cache}")


@pytest.fixture(scope="module")
def undisturbed(settings: Callable[[object], list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The parameters at the end of a run that nothing happens to."""
    return weights(job.run(parse(settings(tmp_path_factory.mktemp("runs") / "undisturbed"))))


def test_workers_and_data_tasks_are_killed(
    settings: Callable[[object], list[str]],
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoints, hold = tmp_path / "run" / "checkpoints", tmp_path / "hold"
    monkeypatch.setattr(job, "work", held_up(hold))
    with training_run(parse(settings(tmp_path / "run"))) as result:
        # a worker in a step, after the first checkpoint
        wait_for(lambda: complete(checkpoints))
        kill(children("ray::RayTrainWorker")[-1:])
        # all workers in the middle of a checkpoint: its files are there, the marker is not
        hold.write_text(MARKER)
        wait_for(lambda: len(restarts(result)) == 1)
        wait_for(lambda: unfinished(checkpoints))
        kill(children("ray::RayTrainWorker"))
        # a task that prepares batches
        hold.write_text("batches")
        wait_for(lambda: len(restarts(result)) == 2)
        wait_for(lambda: kill(children("ray::MapBatches(_Share)")))
        hold.unlink()
    output = "".join(result["lines"])
    assert re.search(r"warning: passing over the checkpoint \S+: unfinished", output)
    assert equal(weights(result["bundle"]), undisturbed)


def test_a_machine_that_is_to_be_taken_away_is_a_reason_to_save(
    settings: Callable[[object], list[str]],
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first worker is told; all save at the same step, and Ray Train starts them again from there."""
    place, notice = tmp_path / "run" / "checkpoints", tmp_path / "notice"
    monkeypatch.setattr(job, "work", to_be_taken_away(notice))
    arguments = [*settings(tmp_path / "run"), "--checkpoints.steps=1000000", "--report_seconds=0"]
    with training_run(parse(arguments)) as result:
        wait_for(lambda: any(line.startswith("step 5 ") for line in result["lines"]))
        assert not complete(place)
        notice.touch()
        wait_for(lambda: len(restarts(result)) == 1)
    output = "".join(result["lines"])
    assert re.search(r"a machine is about to be taken away in \d+ s, with worker 2: saving now", output)
    (saved,) = re.findall(r"training with 2 workers after step (\d+)", output)
    told = re.findall(r"step (\d+) ", output.partition("a machine is about to be taken away")[0])
    assert int(saved) >= int(told[-1])
    assert equal(weights(result["bundle"]), undisturbed)


@pytest.mark.slow
def test_the_driver_is_killed_and_a_checkpoint_is_cut_short(
    settings: Callable[[object], list[str]],
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second attempt has the Ray of the session: starting one proves nothing here."""
    place, arguments = tmp_path / "run" / "checkpoints", settings(tmp_path / "run")
    first = submit("train", arguments)
    wait_for(lambda: len(complete(place)) >= 2)
    orphans = children("ray::", of=first.pid)
    first.kill()
    first.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
    newest, before = complete(place)[:2]
    shard = next(Path(newest).glob("rows-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-100])

    bundle = job.run(parse(arguments))
    output = capsys.readouterr().out
    assert re.search(rf"warning: passing over the checkpoint {newest}: cut short, rows-00001", output)
    assert re.search(rf"training with 2 workers after step [\d,]+, saved by 2: {before}", output)
    assert equal(weights(bundle), undisturbed)
    assert not (tmp_path / "run" / "tokens").exists()


@pytest.mark.slow
def test_sigterm_ends_training_with_one_line_and_it_is_resumed(
    settings: Callable[[object], list[str]], undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As from a scheduler that takes the machine back."""
    place, arguments = tmp_path / "run" / "checkpoints", settings(tmp_path / "run")
    first = submit("train", arguments)
    wait_for(lambda: complete(place))
    own = children("", of=first.pid)
    first.terminate()
    output = first.communicate(timeout=SECONDS)[0]
    assert first.returncode == 143 and "Traceback" not in output, output
    assert output.splitlines()[-1] == "error: ended by SIGTERM; the same command resumes, or starts over"
    assert not (tmp_path / "run" / "_driver.json").exists() and not (tmp_path / "run" / "bundle").exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own))
    assert equal(weights(job.run(parse(arguments))), undisturbed)


@pytest.mark.slow
def test_storage_is_away_for_twenty_seconds_in_a_checkpoint(
    settings: Callable[[object], list[str]], undisturbed: dict[str, torch.Tensor], s3: S3
) -> None:
    output = s3.uri("faults/run")
    with training_run(parse(settings(output))) as result:
        wait_for(lambda: complete(storage.join(output, "checkpoints")))
        s3.stop()
        time.sleep(20)
        s3.start()
    assert restarts(result) == [], "waiting is enough, nothing has to start again"
    assert equal(weights(result["bundle"]), undisturbed)


# -- runs to disturb -----------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> job.TrainConfig:
    return command.parse(job.TrainConfig, arguments)


@contextmanager
def training_run(config: job.TrainConfig) -> Iterator[dict[str, Any]]:
    """A run to disturb; at the end ``bundle`` is its address. ``lines``: what it said."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmc_ray.on_ray.train.journal.say", say)
        told: dict[str, Any] = {"lines": lines}
        with running(lambda: job.run(config)) as outcome:
            yield told
        told["bundle"] = outcome["result"]


def restarts(result: dict[str, Any]) -> list[str]:
    return [line for line in result["lines"] if "workers after step" in line]


def complete(place: object) -> list[str]:
    """The addresses of the complete checkpoints, newest first."""
    try:
        return [saved.uri for saved in find(str(place))]
    except Exception:  # folders come and go under the eyes of whoever looks
        return []


def unfinished(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints that have files and no marker."""
    return [path for path in checkpoints.glob("step-*") if any(path.glob("*.safetensors")) and not (path / MARKER).exists()]


def held_up(hold: Path) -> Callable[[dict[str, Any]], Any]:
    """`job.work` whose workers wait before the step that the file ``hold`` names, for as long as it names it.

    `MARKER`: before a checkpoint's marker is written. "batches": in the tasks that prepare batches. A closure, because Ray
    sends those by value: its workers cannot import a test.
    """

    def wait(name: str) -> None:
        while hold.exists() and hold.read_text() == name:
            time.sleep(0.05)

    def work(settings: dict[str, Any]) -> Any:
        from xmc_ray import storage
        from xmc_ray.on_ray.train import reading, worker

        write_json = storage.write_json

        def write(uri: str, *arguments: Any) -> None:
            wait(uri.rpartition("/")[2])
            write_json(uri, *arguments)

        class _Share(reading._Share):
            def __call__(self, *arguments: Any) -> Any:
                wait("batches")
                return super().__call__(*arguments)

        storage.write_json, reading._Share = write, _Share  # type: ignore[misc]
        return worker.work(settings)

    return work


def to_be_taken_away(notice: Path) -> Callable[[dict[str, Any]], Any]:
    """`job.work` with slow steps, whose first worker gets Ray Train's notice of a machine's end once the file appears."""

    def work(settings: dict[str, Any]) -> Any:
        import threading

        import ray.train
        from ray.train.v2._internal.execution.context import get_train_context

        from xmc_ray.on_ray.train import worker
        from xmc_ray.training import checkpoint

        context, batches = get_train_context(), worker.batches

        def watch() -> None:
            while not notice.exists():
                time.sleep(0.05)
            notice.unlink()
            deadline = int(1000 * (time.time() + 6))
            context.preemption_context.preemption_info = ray.train.PreemptionInfo(deadline, {"a node": [1]})

        def slow(*arguments: Any) -> Any:
            for batch in batches(*arguments):
                time.sleep(0.1)
                yield batch

        if ray.train.get_context().get_world_rank() == 0:
            threading.Thread(target=watch, daemon=True).start()
        worker.batches, worker._ASK_SECONDS, checkpoint._HURRY = slow, 0.5, 1.0
        return worker.work(settings)

    return work


def weights(bundle: str) -> dict[str, torch.Tensor]:
    return dict(load_file(folders.local_copy(bundle) / "model.safetensors"))


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Raises AssertionError unless all parameters are the same, up to the order of float32 sums."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    return True

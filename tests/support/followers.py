"""Callbacks for the tests, and where trackers write in them."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from xmc_ray import Callback

NOT_A_CALLBACK = 3


class Recorder(Callback):
    """Keeps every call, of all its objects in this process, in ``calls``: (hook, what it was given)."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def on_train_start(self, run: Any) -> None:
        self.calls.append(("on_train_start", run))

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("on_log", step, metrics))

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("on_validation", step, metrics))

    def on_checkpoint(self, step: int, uri: str) -> None:
        self.calls.append(("on_checkpoint", step, uri))

    def on_train_end(self, trained: Any) -> None:
        self.calls.append(("on_train_end", trained))

    def on_exception(self, error: BaseException) -> None:
        self.calls.append(("on_exception", error))

    @classmethod
    def of(cls, hook: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in cls.calls if call[0] == hook]


class Raises(Callback):
    """Raises in `on_log`, and counts how often."""

    times = 0

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        Raises.times += 1
        raise RuntimeError("no luck\nat all")


class CannotBeMade(Callback):
    def __init__(self) -> None:
        raise OSError("no such tracker at https://me:secret@example.org")


class Hangs(Callback):
    """Until it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.released.wait(60)


def trackers_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have MLflow and Weights & Biases write to ``folder``, and reach for nothing else."""
    settings = {
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # which MLflow calls in maintenance
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        **{f"WANDB_{name}": str(folder) for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR")},
    }
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        patch.delenv(name, raising=False)
    for name, value in settings.items():
        patch.setenv(name, value)


def forget_wandb() -> None:
    """A process of Weights & Biases reads its variables once."""
    import wandb

    wandb.teardown()

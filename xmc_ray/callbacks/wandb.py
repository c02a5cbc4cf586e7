"""Training runs in Weights & Biases: settings as config, curves, final metrics and the bundle in the summary, the report.

``pip install 'xmc_ray[wandb]'``. Its own variables say where to, and who one is: ``WANDB_MODE``, ``WANDB_PROJECT``,
``WANDB_API_KEY`` and so on.
"""

import os
from collections.abc import Mapping
from typing import Any

from xmc_ray import storage
from xmc_ray.callbacks.callback import Callback, Run, Trained
from xmc_ray.errors import ConfigError

_LOGIN = 60.0  # seconds to wait for somebody to type a key


class WandbCallback(Callback):
    """Logs training runs to Weights & Biases, in ``project`` or the one that ``WANDB_PROJECT`` names, else ``xmc_ray``.

    Raises ConfigError without the package wandb.
    """

    def __init__(self, project: str | None = None) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError("wandb is missing", found=error, way_out="pip install 'xmc_ray[wandb]'") from None
        self.project = project
        self._run: Any = None

    def on_train_start(self, run: Run) -> None:
        """Begin the run, or go on with it: its id in Weights & Biases is `Run.id`.

        What is printed and what the working folder holds stay here, and a run of the caller's own stays open.
        """
        import wandb

        self._run = wandb.init(
            project=self.project or os.environ.get("WANDB_PROJECT") or "xmc_ray",
            id=run.id,
            name=os.environ.get("WANDB_NAME") or run.name,
            resume="allow",
            config=dict(run.settings),
            allow_val_change=True,  # some settings may change when a run is resumed
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, reinit="create_new", login_timeout=_LOGIN
            ),
        )

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``train/loss`` and so on."""
        self._log("train", metrics, step)

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``validation/P@1`` and so on."""
        self._log("validation", metrics, step)

    def on_train_end(self, trained: Trained) -> None:
        """The summary gets ``final/P@1`` and so on, ``bundle`` and ``fingerprint``; files become an artifact."""
        if self._run is None:
            return
        import wandb

        ends = {"bundle": trained.bundle, "fingerprint": trained.fingerprint}
        self._run.summary.update({name: value for name, value in ends.items() if value is not None})
        self._run.summary.update({f"final/{name}": value for name, value in trained.metrics.items()})
        if trained.files:
            artifact = wandb.Artifact(f"report-{self._run.id}", "report", metadata={**ends})
            for name, uri in trained.files.items():
                with artifact.new_file(name, encoding="utf-8") as file:
                    file.write(storage.read_bytes(uri).decode())
            self._run.log_artifact(artifact)
        self._run.finish()

    def on_exception(self, error: BaseException) -> None:
        """The run has failed."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def _log(self, prefix: str, metrics: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            self._run.log({f"{prefix}/{name}": value for name, value in metrics.items()}, step=step)

"""Training runs in MLflow: settings as params, curves, final metrics, the report as an artifact, the bundle as tags.

``pip install 'xmc_ray[mlflow]'``. MLflow's own variables say where to, and who one is: ``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME``, ``MLFLOW_TRACKING_TOKEN`` and so on.
"""

import getpass
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from xmc_ray import storage
from xmc_ray.callbacks.callback import Callback, Run, Trained
from xmc_ray.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "xmc_ray.run"
"""The tag by which a run that is resumed finds its run in MLflow: `Run.id`."""

_AT_ONCE = 100  # params that a call may log
_LONGEST = 6000  # characters of a param


class MLflowCallback(Callback):
    """Logs training runs to MLflow, in ``experiment`` or the one that ``MLFLOW_EXPERIMENT_NAME`` names.

    Names have ``_at_`` in place of ``@``, which MLflow does not take: ``validation/P_at_1``. Raises ConfigError without MLflow.
    """

    def __init__(self, experiment: str | None = None) -> None:
        try:
            import mlflow  # noqa: F401
        except ImportError as error:
            raise ConfigError("MLflow is missing", found=error, way_out="pip install 'xmc_ray[mlflow]'") from None
        self.experiment = experiment
        self._client: MlflowClient | None = None
        self._run = ""

    def on_train_start(self, run: Run) -> None:
        """Open the run that has this one's id, or make one; its params are the settings."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        experiment = _experiment(client, self.experiment)
        known = client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
            client.update_run(self._run, status="RUNNING")
        else:
            self._run = client.create_run(experiment, run_name=run.name, tags=_tags(run)).info.run_id
        logged = set(known[0].data.params) if known else set()  # MLflow refuses another value
        named = {_named(name): str(value)[:_LONGEST] for name, value in run.settings.items()}  # of two alike the last
        params = [Param(name, value) for name, value in named.items() if name not in logged]
        for first in range(0, len(params), _AT_ONCE):
            client.log_batch(self._run, params=params[first : first + _AT_ONCE])

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``train/loss`` and so on."""
        self._log("train", metrics, step)

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``validation/P_at_1`` and so on."""
        self._log("validation", metrics, step)

    def on_train_end(self, trained: Trained) -> None:
        """Metrics as ``final/P_at_1`` and so on, files as artifacts, the bundle's address and fingerprint as tags."""
        if self._client is None:
            return
        self._log("final", trained.metrics, 0)
        for name, value in (("bundle", trained.bundle), ("fingerprint", trained.fingerprint)):
            if value is not None:
                self._client.set_tag(self._run, f"xmc_ray.{name}", value)
        for name, uri in trained.files.items():
            self._client.log_text(self._run, storage.read_bytes(uri).decode(), name)
        self._client.set_terminated(self._run, "FINISHED")

    def on_exception(self, error: BaseException) -> None:
        """The run is KILLED by Ctrl-C and signals, and has FAILED otherwise."""
        if self._client is not None:
            self._client.set_terminated(self._run, "FAILED" if isinstance(error, Exception) else "KILLED")

    def _log(self, prefix: str, metrics: Mapping[str, float], step: int) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(f"{prefix}/{_named(name)}", float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=entries)


def _experiment(client: "MlflowClient", name: str | None) -> str:
    """The id of the experiment; it is made if there is none of its name."""
    if name is None and (given := os.environ.get("MLFLOW_EXPERIMENT_ID")):  # `mlflow.set_experiment` sets it, too
        return given
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    known = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if known is None else known.experiment_id)


def _tags(run: Run) -> dict[str, str]:
    tags = {TAG: run.id, "mlflow.source.name": "xmc_ray"} | ({} if run.output is None else {"xmc_ray.output": run.output})
    with suppress(Exception):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _named(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))

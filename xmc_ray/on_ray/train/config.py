"""The settings of the training job."""

import os
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch

from xmc_ray import storage
from xmc_ray.callbacks.calls import check_names
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.rejects import MAX_REJECT_SHARE
from xmc_ray.data.split import ValidationConfig
from xmc_ray.errors import ConfigError
from xmc_ray.model.precision import settled
from xmc_ray.model.threads import use_threads
from xmc_ray.settings import MAY_CHANGE_ON_RESUME, Bounds, NonNegativeFloat, NonNegativeInt, PositiveInt, Settings, Share
from xmc_ray.storage.address import Start
from xmc_ray.training.checkpoint import CheckpointsConfig
from xmc_ray.training.fit import FitConfig


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Settings):
    """The training workers on the cluster."""

    count: PositiveInt = 1
    """Workers; each takes its share of every batch and owns its share of the label groups."""
    least: PositiveInt | None = None
    """Start, or continue after a loss, with as few as this while the cluster has no room for all; None waits for all."""
    gpu: bool = False
    """Give each worker a GPU."""
    cpus: PositiveInt = 1
    """CPUs that a worker requests."""
    threads: NonNegativeInt = 0
    """Threads of a worker on a CPU; 0 shares the machine's cores among the workers on it."""
    max_failures: Annotated[int, Bounds(ge=-1)] = 3
    """How often the workers are restarted from their last checkpoint after one has died; -1 is unlimited."""
    patience: NonNegativeFloat = 30.0
    """Minutes to wait for a cluster that has no room for the workers yet."""

    def check(self) -> None:
        """Raises ConfigError if ``least`` is more than ``count``."""
        if self.least is not None and self.least > self.count:
            raise ConfigError("workers.least is above workers.count", found=self.least, expected=f"at most {self.count}")

    @property
    def device(self) -> torch.device:
        """The kind of device of a worker."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def resources(self) -> dict[str, float]:
        """Options of a Ray task with the resources of a worker."""
        return {"num_cpus": self.cpus, "num_gpus": 1 if self.gpu else 0}

    @property
    def needs(self) -> dict[str, float]:
        """What a worker takes of the cluster."""
        return {"CPU": float(self.cpus)} | ({"GPU": 1.0} if self.gpu else {})


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """The report of a finished run."""

    documents: NonNegativeInt = 100_000
    """Maximum number of held-out documents to predict for it, rounded up to chunks of 4,096; 0 predicts none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig):
    """Train a LightXML model and save it as a bundle."""

    essentials: ClassVar = (
        "documents.uri",
        "output",
        "encoder.name",
        "recipe",
        "documents.text",
        "documents.labels",
        "label_names",
        "loop.epochs",
        "loop.minutes",
        "workers.count",
    )

    documents: DocumentsConfig
    """The training split."""
    output: storage.Address = field(metadata=MAY_CHANGE_ON_RESUME)
    """Run folder, local or s3://."""
    recipe: Literal["given", "auto"] = "given"
    """auto decides the settings of model and training by what kind of data the documents are; given takes them as they are."""
    label_names: storage.Source | None = None
    """Table (Parquet, CSV, TSV or JSON lines) with columns label and name, if labels have names; one name a label."""
    max_reject_share: Share = field(default=MAX_REJECT_SHARE, metadata=MAY_CHANGE_ON_RESUME)
    """Share of rejected documents above which training does not start."""
    resume: Start = field(default="auto", metadata=MAY_CHANGE_ON_RESUME)
    """auto resumes an unfinished run in the run folder; never requires an empty one; else the address of a checkpoint."""
    cache: storage.Address | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Folder for the documents' tokens, shared by several runs; None keeps them in the run folder until the run is finished."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    calibration: storage.Source | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """calibration.parquet of a bundle of the same recipe that was trained without held-out documents: it calibrates this model,
    which may then be trained on everything (validation.share = 0)."""
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig, metadata=MAY_CHANGE_ON_RESUME)
    workers: WorkersConfig = field(default_factory=WorkersConfig, metadata=MAY_CHANGE_ON_RESUME)
    report: ReportConfig = field(default_factory=ReportConfig, metadata=MAY_CHANGE_ON_RESUME)
    report_seconds: NonNegativeFloat = field(default=10.0, metadata=MAY_CHANGE_ON_RESUME)
    """Seconds from one line of progress to the next."""
    callbacks: list[str] = field(default_factory=list, metadata=MAY_CHANGE_ON_RESUME)
    """Who follows the run: mlflow, wandb, or callbacks of your own as package.module:name."""

    def check(self) -> None:
        """Raises ConfigError for columns of text that are not the fields, if there are any, for feedback without ids, and for
        what is no name of a callback."""
        super().check()
        check_names(self.callbacks)
        if self.feedback.uri is not None and self.documents.id is None:
            what, way_out = "feedback names documents by their ids", "set documents.id to the column of the ids"
            raise ConfigError(what, found="documents.id = null", way_out=way_out)
        self.documents.with_fields([*(self.text.fields or {})])

    def use_threads(self, local_workers: int = 1) -> None:
        """Compute with the threads of one of so many workers of a machine: all in every operation of a transformer.

        Those of words alone are too short for that on a CPU (`model.threads`).
        """
        use_threads(self.threads(local_workers), together=self.workers.gpu or self.encoder.layers != 0)

    def threads(self, local_workers: int = 1) -> int:
        """The threads of one of so many workers of a machine."""
        return self.workers.threads or max(1, len(os.sched_getaffinity(0)) // local_workers)

    def settled(self) -> "TrainConfig":
        """With the precision ``auto`` replaced by what it is on this machine, so that all workers compute alike."""
        return replace(self, loop=replace(self.loop, precision=settled(self.loop.precision, self.workers.device.type)))

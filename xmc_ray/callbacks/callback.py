"""What a training run tells those who follow it.

    class Losses(Callback):
        def on_log(self, step, metrics):
            print(step, metrics["loss"])

    XMCClassifier.fit(texts, labels, callbacks=[Losses()])

Hooks are called in the process that started the training, never on its workers.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run that begins or, if it is ``resumed``, goes on."""

    name: str
    """What to call it."""
    settings: Mapping[str, Any]
    """All settings by their dotted names; those that are None are left out."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """32 hexadecimal digits; a run that is resumed keeps them."""
    output: str | None = None
    """The run folder, if it has one."""
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run has come to."""

    metrics: Mapping[str, float]
    """Of the model that is kept: of a job, the numbers in the bundle's ``metrics.json``; nested ones as ``calibration/ECE@5``.
    Of `XMCClassifier.fit`, losses of some training documents, documents and seconds."""
    bundle: str | None = None
    """The bundle's address; None where it is only in memory."""
    fingerprint: str | None = None
    """The bundle's fingerprint."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Addresses of texts to read, by name: ``report.html``, and ``README.md`` with the model's card."""


class Callback:
    """Follows a training run; override what you need.

    A hook that raises never ends the training: a line says so, and that callback is not called again.
    """

    def on_train_start(self, run: Run) -> None:
        """Before the first step, or before the first one after a checkpoint."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every few seconds of training: losses, learning rates, ``documents_per_second``; losses are means of recent steps.

        After a validation: the loss of some training documents, and what training has cost so far.
        """

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a validation on held-out documents, with its metrics. `XMCClassifier.fit` holds none out."""

    def on_checkpoint(self, step: int, uri: str) -> None:
        """Once a checkpoint is complete; it goes when newer ones are there. `XMCClassifier.fit` makes none."""

    def on_train_end(self, trained: Trained) -> None:
        """After the model, and the report if there is one, are complete."""

    def on_exception(self, error: BaseException) -> None:
        """When an error, or Ctrl-C, ends a run that has started; `on_train_end` is not called then."""


def flat(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one, with names such as ``loop.epochs``; values that are None are left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}{separator}{inner}": part for inner, part in flat(value, separator).items()}
        elif value is not None:
            found[name] = value
    return found

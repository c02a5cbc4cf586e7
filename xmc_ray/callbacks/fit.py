"""What callbacks are told of a training in this process: every few seconds, of its last step, and of how it ends."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xmc_ray.callbacks.callback import Callback, Run, Trained, flat
from xmc_ray.callbacks.calls import Calls
from xmc_ray.errors import warn_caller

_SECONDS = 5.0  # from one call of `on_log` to the next


class FollowedFit:
    """A training that callbacks follow, as a context: an error within ends it. A failing callback is a warning."""

    def __init__(self, callbacks: Sequence[Callback], settings: Mapping[str, Any]) -> None:
        self._call, self._settings = Calls(callbacks, warn_caller), settings
        self._told = -math.inf
        self._untold: tuple[int, Callable[[], dict[str, float]]] | None = None

    def __enter__(self) -> "FollowedFit":
        try:
            self._call("on_train_start", Run(name="fit", settings=flat(self._settings)))
        except BaseException as error:  # Ctrl-C, when some may have begun
            self._call("on_exception", error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._call("on_exception", error)

    def log(self, step: int, figures: Callable[[], dict[str, float]]) -> None:
        """After every step; ``figures`` is called if it is time to tell of it, or if this was the last."""
        self._untold = step, figures
        if time.monotonic() - self._told >= _SECONDS:
            self.log_last()

    def log_last(self) -> None:
        """Tell of the last step, unless that is done."""
        if self._untold is None:
            return
        step, figures = self._untold
        if self._call.callbacks:
            self._call("on_log", step, figures())
        self._told, self._untold = time.monotonic(), None

    def end(self, metrics: Mapping[str, float | None]) -> None:
        """Tell of the model, which is complete; metrics that are None are left out."""
        self._call("on_train_end", Trained(metrics=flat(metrics)))

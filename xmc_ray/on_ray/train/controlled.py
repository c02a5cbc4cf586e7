"""What Ray Train's controller is given. It holds no model, so what it unpickles imports none."""

from typing import Any

from ray.train import UserCallback

from xmc_ray.errors import UnavailableError
from xmc_ray.on_ray.session import find_own


def work(settings: dict[str, Any]) -> None:
    """`worker.work`, whose module is imported on the worker."""
    from xmc_ray.on_ray.train import worker

    worker.work(settings)


class EndAtOnce(UserCallback):
    """Ends training at the first error of ours that another attempt would meet again: an error in a callback is final."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the error of the first worker that has one."""
        for error in worker_exceptions.values():
            own = find_own(error)
            if own is not None and not isinstance(own, UnavailableError):
                raise own

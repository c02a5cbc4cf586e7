"""Steps of a job that wait until a test lets them go on, in whatever process they are."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xmc_ray import command
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig


class Latch:
    """Lets some calls of a step pass and holds all others until it is opened; it lives in a folder, which all processes see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.passed, self.limit = folder, folder / "passed", folder / "limit"

    def let(self, calls: int) -> "Latch":
        """``calls``: how many may pass in all."""
        self.passed.parent.mkdir(parents=True, exist_ok=True)
        new = self.limit.with_suffix(".new")
        new.write_text(str(calls))
        new.replace(self.limit)
        return self

    def waiting(self) -> bool:
        """Whether a call is held now, or one that was held has been killed."""
        return self.passed.exists() and self.passed.stat().st_size > int(self.limit.read_text())

    def open(self) -> None:
        """For all."""
        self.let(1_000_000_000)

    def hold(self, step: Callable[..., Any]) -> type:
        """A class in place of ``step``, which is one or makes the same; its instances wait when they are called."""
        passed, limit = self.passed, self.limit

        # In here, so that cloudpickle hands its code, and not the name of this module, to processes that cannot import it.
        class Held:
            def __init__(self, *arguments: Any, **settings: Any) -> None:
                self.step = step(*arguments, **settings)

            def __call__(self, *arguments: Any) -> Any:
                with passed.open("a") as file:
                    file.write(".")
                    file.flush()
                    turn = file.tell()
                while turn > int(limit.read_text()):
                    time.sleep(0.01)
                return self.step(*arguments)

        return Held


if __name__ == "__main__":  # jobs/tag.py with a model that waits: latch.py FOLDER arguments...
    import sys

    job.load_predictor = Latch(Path(sys.argv.pop(1))).hold(job.load_predictor)
    raise SystemExit(command.run(job.tag, TagConfig))

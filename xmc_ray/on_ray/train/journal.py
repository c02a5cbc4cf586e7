"""The journal of a training run: what its workers report, on the console, in ``metrics.jsonl`` and in TensorBoard."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from tensorboardX import SummaryWriter

from xmc_ray import storage
from xmc_ray.errors import XmcError
from xmc_ray.storage import folders

_EVERY = 60.0  # seconds between two copies of the journal to ``output``: what a killed driver loses


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)


@contextmanager
def journal(output: str, tell: Callable[[dict[str, Any]], object] = lambda entry: None) -> Iterator[Queue]:
    """A queue for the workers' reports: ``line`` is printed, and with a ``step`` the rest goes to both records.

    The records, ``metrics.jsonl`` and TensorBoard's, are copied to ``output`` now and then, and when the block ends. What has
    been copied, ``tell`` is given, entry by entry, as well as those of a ``checkpoint``, which no record has.
    """
    here = ray.get_runtime_context().get_node_id()  # the queue must survive the loss of any other node
    mailbox = Queue(actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": here}})
    done = threading.Event()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines, before = folder / "metrics.jsonl", storage.join(output, "metrics.jsonl")
        lines.write_bytes(storage.read_bytes(before) if storage.exists(before) else b"")
        writer = SummaryWriter(str(folder / "tensorboard"))
        untold: list[dict[str, Any]] = []

        def copy() -> None:
            folders.upload(folder, output)
            while untold:
                tell(untold.pop(0))

        def read() -> None:
            with suppress(RayError):  # training outlives its journal, and so does its end
                read_all()

        def read_all() -> None:
            copied = time.monotonic()
            while not (done.is_set() and mailbox.empty()):
                try:
                    entry = mailbox.get(timeout=0.5)
                except Empty:
                    continue
                if "line" in entry:
                    say(entry.pop("line"))
                if "step" not in entry:
                    continue
                untold.append(entry)
                if "checkpoint" in entry:
                    continue
                with lines.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                for name, value in entry.items():
                    writer.add_scalar(name, value, entry["step"])
                if time.monotonic() - copied > _EVERY or any(name.startswith("validation/") for name in entry):
                    copied = time.monotonic()
                    writer.flush()
                    with suppress(XmcError):  # the copy at the end has it all
                        copy()

        reader = threading.Thread(target=read, name="journal")

        def close() -> None:
            done.set()
            reader.join()
            writer.close()
            mailbox.shutdown()

        reader.start()
        try:
            yield mailbox
        except BaseException:
            close()
            with suppress(XmcError):  # what has ended training is what is to be told, and soon
                copy()
            raise
        close()
        storage.patiently(copy)

"""Parts of a step side by side on the cores of a machine.

Torch's own threads meet at the end of every operation. Those of words alone take a tenth of a millisecond, and where anything
else runs, threads that wait for each other are no faster than one. Here a thread takes a whole part, such as a thousand groups,
and computes all of it alone. What comes of it is the same for any number of threads, to the last bit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 2  # parts for each thread that wait for it: the next are not made before there is room


class _Threads(local):
    """Those of this process, as a thread sees them: one of the pool has none of its own."""

    pool: ThreadPoolExecutor | None = None
    count = 1


_threads = _Threads()


def use_threads(number: int, together: bool) -> None:
    """Compute with so many threads in this process: ``together`` in every operation, or else side by side, see `mapped`."""
    torch.set_num_threads(number if together else 1)
    if _threads.pool is not None:
        _threads.pool.shutdown()
    _threads.count = 1 if together else number
    # A new thread takes the number over when it first asks for it, which not all operations do: grouped_mm would use all cores.
    _threads.pool = None if _threads.count == 1 else ThreadPoolExecutor(_threads.count, initializer=torch.get_num_threads)


def mapped(function: Callable[[A], B], parts: Iterable[A]) -> Iterator[B]:
    """What ``function`` makes of each of the ``parts``, in their order; without gradients and automatic types.

    The parts themselves are made by the caller's thread, meanwhile. Parts must not write to the same place.
    """
    pool = _threads.pool
    if pool is None:
        for part in parts:
            yield _computed(function, part)
        return
    waiting = deque[Future[B]]()
    for part in parts:
        waiting.append(pool.submit(_computed, function, part))
        if len(waiting) > _AHEAD * _threads.count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _computed(function: Callable[[A], B], part: A) -> B:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return function(part)

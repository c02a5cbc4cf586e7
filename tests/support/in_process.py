"""A night without Ray: its steps called one after the other in this process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.tag.gauges import Value
from xmc_ray.on_ray.tag.runner import Predict, Read, Row, Runner, Write


class InProcess(Runner):
    """The runner of most tests; a value is its own handle. It notes what was asked of it."""

    def __init__(self) -> None:
        self.rooms, self.boards, self.told = 0, list[tuple[str, dict[str, str]]](), list[list[Value]]()

    def start(self, pool: PoolConfig) -> PoolConfig:
        return replace(pool, max=pool.max or pool.min)

    def make_room(self, pool: PoolConfig) -> None:
        self.rooms += 1

    def board(self, name: str, labels: Mapping[str, str]) -> "InProcess":
        self.boards.append((name, dict(labels)))
        return self

    def tell(self, values: Sequence[Value], is_over: bool, seconds: float) -> None:
        self.told.append(list(values))

    def put(self, value: Any) -> Any:
        return value

    def submit(self, task: Any, *arguments: Any, returns: int = 1) -> Any:
        result = task(*arguments)
        assert returns == 1 or len(result) == returns
        return result

    def get(self, handle: Any) -> Any:
        return handle

    def run_pieces(
        self, groups: Sequence[pa.Table], read: Read, predictor: Callable[[], Predict], write: Write, pool: PoolConfig
    ) -> Iterator[Row]:
        predict = predictor()
        for group in groups:
            for number, table in read(group.to_pylist()):
                yield write(number, predict(table))

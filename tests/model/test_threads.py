"""Parts of a step side by side: in their order, without gradients, and with the results that one thread has."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import OPTIM, batch_of, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model import pairs, ranking, recall
from xmc_ray.model.threads import mapped, use_threads
from xmc_ray.training.optim import Optimizer


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    use_threads(before, together=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_an_error_is_that_of_its_part(threads: int) -> None:
    use_threads(threads, together=False)

    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return 10 // number if number != 7 else 10 // 0

    assert [*mapped(slow, range(1, 7))] == [10, 5, 3, 2, 2, 1]
    with pytest.raises(ZeroDivisionError):
        _ = [*mapped(slow, range(1, 20))]
    assert [*mapped(slow, ())] == []


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_parts_are_computed_where_these_are(threads: int) -> None:
    """A thread that waited for others of its own kind might wait for ever."""
    use_threads(threads, together=False)
    assert [*mapped(lambda n: sum(mapped(lambda m: m * n, range(20))), range(20))] == [190 * n for n in range(20)]


def test_there_are_neither_gradients_nor_automatic_types() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    for threads in (1, 2):
        use_threads(threads, together=False)
        with torch.autocast("cpu", torch.bfloat16):
            (product,) = mapped(lambda part: weight @ part, [torch.ones(2, 2)])
        assert not product.requires_grad and product.dtype == torch.float32


def test_a_thread_computes_alone_from_its_first_operation_on() -> None:
    """grouped_mm does not ask how many threads there are, and with several it rounds otherwise."""
    torch.manual_seed(0)
    ends_U = torch.randint(1, 30, (256,)).cumsum(0).int()
    left_NA, right_UAC = torch.randn(int(ends_U[-1]), 8), torch.randn(256, 8, 32)
    use_threads(1, together=False)
    alone_NC = F.grouped_mm(left_NA, right_UAC, offs=ends_U)
    use_threads(3, together=False)
    assert all(
        torch.equal(alone_NC, each) for each in mapped(lambda _: F.grouped_mm(left_NA, right_UAC, offs=ends_U), range(6))
    )


def test_a_table_that_is_rounded_at_random_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads would draw from one generator in whatever order they come."""
    monkeypatch.setattr(ranking, "_GROUPS", 2)
    trained = []
    for threads in (1, 3, 3, 3):
        use_threads(threads, together=False)
        torch.manual_seed(0)
        model = toy_model(LabelGroups(np.arange(400) % 130), lexical=True, shortlist=40, table="bfloat16")
        optimizer, rng = Optimizer(model, OPTIM), np.random.default_rng(0)
        losses = model(batch_of(rng, [[row % 400, row * 7 % 400] for row in range(64)]))
        (losses.recall + losses.rank).backward()
        optimizer.step(0.3)
        trained.append(model.table.weight.clone())
    assert trained[0].dtype == torch.bfloat16 and all(torch.equal(trained[0], other) for other in trained)


@pytest.mark.parametrize("flat", [True, False])
def test_a_step_is_the_same_for_any_number_of_threads(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((recall, "_GROUPS"), (ranking, "_GROUPS"), (pairs, "_GROUPS")):
        monkeypatch.setattr(module, name, 2)  # so that there are several parts of each kind
    trained = []
    for threads in (1, 3):
        use_threads(threads, together=False)
        model = toy_model(LabelGroups(np.arange(40) if flat else np.arange(40) % 13), lexical=True, shortlist=4)
        optimizer, rng = Optimizer(model, OPTIM), np.random.default_rng(0)
        for step in range(4):
            losses = model(batch_of(rng, [[row % 40, row * 7 % 40] for row in range(step, step + 24)]))
            (losses.recall + losses.rank).backward()
            optimizer.step(0.3)
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name

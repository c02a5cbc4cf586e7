"""When callbacks are told of a training in this process; `tests/test_fitting.py` has trainings."""

from typing import Any

import pytest
from followers import Raises, Recorder

from xmc_ray.callbacks import fit
from xmc_ray.callbacks.fit import FollowedFit


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "calls", [])


def test_figures_are_computed_only_for_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 5.0, 5.0, 9.0, 9.0])
    monkeypatch.setattr(fit.time, "monotonic", clock.__next__)
    computed = []

    def figures(step: int) -> dict[str, float]:
        computed.append(step)
        return {"loss": 1.0 / step}

    with FollowedFit([Recorder()], {"loop": {"epochs": 3, "minutes": None}}) as followed:
        for step in (1, 2, 3, 4):
            followed.log(step, lambda step=step: figures(step))  # type: ignore[misc]
        followed.log_last()
        followed.log_last()
    followed.end({"late_loss": None, "sample_loss": 0.5})
    assert computed == [1, 3, 4] == [step for step, _ in Recorder.of("on_log")]
    ((run,),), ((trained,),) = Recorder.of("on_train_start"), Recorder.of("on_train_end")
    assert run.name == "fit" and run.settings == {"loop.epochs": 3} and trained.metrics == {"sample_loss": 0.5}


def test_without_callbacks_nothing_is_computed() -> None:
    with FollowedFit([], {}) as followed:
        followed.log(1, pytest.fail)
        followed.log_last()


def test_an_error_is_told_and_raised() -> None:
    with pytest.raises(KeyboardInterrupt), FollowedFit([Recorder()], {}):
        raise KeyboardInterrupt
    assert [call[0] for call in Recorder.calls] == ["on_train_start", "on_exception"]


def test_a_warning_is_of_the_line_that_has_called() -> None:
    with (
        pytest.warns(UserWarning, match="callback Raises is not called any more") as said,
        FollowedFit([Raises()], {}) as followed,
    ):
        followed.log(1, lambda: {"loss": 1.0})
    assert said[0].filename == __file__


def test_what_has_begun_is_told_of_an_end_before_the_first_step() -> None:
    """Ctrl-C while a later callback begins."""

    class Interrupted(Recorder):
        def on_train_start(self, run: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), FollowedFit([Recorder(), Interrupted()], {}):
        pytest.fail("it has begun")
    assert [call[0] for call in Recorder.calls] == ["on_train_start", "on_exception", "on_exception"]

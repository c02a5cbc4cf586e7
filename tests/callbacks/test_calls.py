"""No callback ends a training, holds it up, or is told of twice; names of callbacks in settings."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from followers import Hangs, Raises, Recorder

from xmc_ray import Callback, ConfigError, MLflowCallback
from xmc_ray.callbacks.calls import Calls, InBackground, by_name, check_callbacks, check_names


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    Recorder.calls.clear()
    Raises.times = 0
    yield
    Recorder.calls.clear()


def test_one_that_raises_is_named_in_a_line_and_not_called_again() -> None:
    lines: list[str] = []
    call = Calls([Raises(), Recorder()], lines.append)
    for step in (1, 2):
        call("on_log", step, {"loss": 0.5})
    assert Recorder.calls == [("on_log", 1, {"loss": 0.5}), ("on_log", 2, {"loss": 0.5})]
    assert lines == ["warning: callback Raises is not called any more: on_log raised RuntimeError: no luck"]
    assert Raises.times == 1


@pytest.mark.parametrize("error", [SystemExit("bye"), ModuleNotFoundError("No module named 'x'"), AssertionError()])
def test_whatever_is_raised(error: BaseException) -> None:
    class Fails(Callback):
        def on_train_start(self, run: Any) -> None:
            raise error

    lines: list[str] = []
    Calls([Fails()], lines.append)("on_train_start", None)
    assert lines[0].startswith(f"warning: callback Fails is not called any more: on_train_start raised {type(error).__name__}")


def test_ctrl_c_goes_through() -> None:
    class Interrupted(Callback):
        def on_log(self, step: int, metrics: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Calls([Interrupted()], pytest.fail)("on_log", 1, {})


def test_credentials_are_not_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")

    class Leaks(Callback):
        def on_log(self, step: int, metrics: Any) -> None:
            raise OSError("request to https://me:secret@example.org/api failed with key 0123456789abcdef")

    lines: list[str] = []
    Calls([Leaks()], lines.append)("on_log", 1, {})
    assert lines[0].endswith("OSError: request to https://***@example.org/api failed with key ***")


def test_one_that_is_dropped_may_end_what_it_has_begun() -> None:
    """Else a run would go on for ever in its tracker; one that fails there as well is left."""
    ended: list[BaseException] = []

    class Fails(Callback):
        def on_log(self, step: int, metrics: Any) -> None:
            raise OSError("away")

        def on_exception(self, error: BaseException) -> None:
            ended.append(error)
            raise error

    lines: list[str] = []
    call = Calls([Fails()], lines.append)
    call("on_log", 1, {})
    call("on_exception", KeyboardInterrupt())
    assert [str(error) for error in ended] == ["away"] and len(lines) == 1


def test_credentials_are_not_in_the_error_of_what_cannot_be_made() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be made: .*; found OSError: no such tracker at https://\*\*\*@example\.org$"
    ):
        by_name(["followers:CannotBeMade"])


def test_each_has_its_own_copy() -> None:
    class Greedy(Callback):
        def on_log(self, step: int, metrics: Any) -> None:
            metrics.clear()

    Calls([Greedy(), Recorder()], pytest.fail)("on_log", 1, {"loss": 0.5})
    assert Recorder.calls == [("on_log", 1, {"loss": 0.5})]


def test_in_the_background_calls_keep_their_order() -> None:
    call = InBackground(Calls([Recorder()], pytest.fail))
    for step in range(100):
        call("on_log", step, {})
    assert call.close(60)
    assert [step for step, _ in Recorder.of("on_log")] == [*range(100)]
    call("on_log", 100, {})
    assert call.close(0) and len(Recorder.calls) == 100


def test_one_that_hangs_is_left_behind() -> None:
    hanging = Hangs()
    call = InBackground(Calls([hanging, Recorder()], pytest.fail))
    call("on_log", 1, {})
    assert not call.close(0.05)
    hanging.released.set()
    assert call.close(60) and len(Recorder.calls) == 1


def test_without_callbacks_there_is_no_thread() -> None:
    call = InBackground(Calls([], pytest.fail))
    call("on_log", 1, {})
    assert call.close(0)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["nothing"], r"callbacks names no callback; found 'nothing'; expected mlflow, wandb or package\.module:name"),
        (["module:"], "callbacks names no callback"),
        ([""], "callbacks names no callback; found ''"),
        (["mlflow", "wandb", "mlflow"], "callbacks names one twice; found 'mlflow'"),
    ],
)
def test_names_are_checked_before_anything_is_imported(names: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_names(names)


def test_names_become_callbacks() -> None:
    check_names(["mlflow", "followers:Recorder"])
    mlflow, own = by_name(["mlflow", "followers:Recorder"])
    assert isinstance(mlflow, MLflowCallback) and isinstance(own, Recorder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:name", "the callback cannot be imported: no_such_module:name; found ModuleNotFoundError"),
        ("followers:nothing", "the callback cannot be imported: followers:nothing; found AttributeError"),
        ("followers:CannotBeMade", "the callback cannot be made: followers:CannotBeMade; found OSError: no such tracker"),
        ("followers:NOT_A_CALLBACK", "the callback cannot be made: followers:NOT_A_CALLBACK; found TypeError"),
        ("builtins:dict", "not a callback: builtins:dict; found dict; expected a subclass of xmc_ray.Callback"),
    ],
)
def test_what_is_no_callback_is_told_in_a_line(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        by_name([name])


@pytest.mark.parametrize(("name", "package"), [("mlflow", "MLflow"), ("wandb", "wandb")])
def test_a_missing_library_is_a_line_with_the_command(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{package} is missing; found .*; pip install 'xmc_ray\[{name}\]'"):
        by_name([name])


def test_in_python_callbacks_are_objects() -> None:
    check_callbacks([Recorder()])
    with pytest.raises(ConfigError, match=r"not a callback; found the class Recorder; expected an object"):
        check_callbacks([Recorder])
    with pytest.raises(ConfigError, match="not a callback; found str"):
        check_callbacks(["mlflow"])

"""How hooks are called: one callback after another, and none of them can end or hold up a training."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Literal

from xmc_ray.callbacks.callback import Callback
from xmc_ray.errors import ConfigError, scrubbed
from xmc_ray.settings import imported

Hook = Literal["on_train_start", "on_log", "on_validation", "on_checkpoint", "on_train_end", "on_exception"]

_KNOWN = {"mlflow": "xmc_ray.callbacks.mlflow:MLflowCallback", "wandb": "xmc_ray.callbacks.wandb:WandbCallback"}
_EXPECTED = f"{', '.join(_KNOWN)} or package.module:name"


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a setting that names no callback, or one twice; imports nothing."""
    for name in names:
        module, _, member = name.partition(":")
        if name not in _KNOWN and not (module and member):
            raise ConfigError("callbacks names no callback", found=repr(name), expected=_EXPECTED)
        if names.count(name) > 1:
            raise ConfigError("callbacks names one twice", found=repr(name))


def by_name(names: Iterable[str]) -> list[Callback]:
    """The callbacks that a setting names. ConfigError for what is not there, cannot be made, or is no callback."""
    return [_made(name) for name in names]


def check_callbacks(callbacks: Iterable[object]) -> None:
    """Raises ConfigError unless it is a list of callbacks, and of made ones."""
    if not isinstance(callbacks, list | tuple):
        raise ConfigError("callbacks are no list", found=type(callbacks).__name__, expected="a list of callbacks")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            found = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
            raise ConfigError("not a callback", found=found, expected="an object of a subclass of xmc_ray.Callback")


class Calls:
    """Calls a hook of several callbacks, in their order.

    One that raises is named in a line for ``warn``, and not called again but for its ``on_exception``: what it follows is
    incomplete from then on, and a tracker that is away would have every hook wait for it.
    """

    def __init__(self, callbacks: Iterable[Callback], warn: Callable[[str], object]) -> None:
        self.callbacks, self._warn = [*callbacks], warn

    def __call__(self, hook: Hook, *arguments: object) -> None:
        """Each callback gets its own copy of a dict."""
        for callback in [*self.callbacks]:
            own = [dict(argument) if isinstance(argument, dict) else argument for argument in arguments]
            try:
                getattr(callback, hook)(*own)
            except (Exception, SystemExit) as error:
                self.callbacks = [other for other in self.callbacks if other is not callback]
                if hook != "on_exception":  # or its run would look as if it went on for ever
                    with suppress(Exception):
                        callback.on_exception(error)
                self._warn(_failure(callback, hook, error))


class InBackground:
    """`Calls` in a thread, in order: a tracker that is slow, or does not answer, holds up neither training nor its lines."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._waiting: SimpleQueue[tuple[Hook, tuple[object, ...]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="callbacks", daemon=True)
        if calls.callbacks:
            self._thread.start()

    def __call__(self, hook: Hook, *arguments: object) -> None:
        """Returns at once."""
        if self._thread.is_alive():
            self._waiting.put((hook, arguments))

    def close(self, seconds: float) -> bool:
        """Wait so long for the calls that are left; whether all were made."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            self._calls(call[0], *call[1])


def _made(name: str) -> Callback:
    what = imported(_KNOWN.get(name, name), "the callback")
    try:
        callback: Any = what if isinstance(what, Callback) else what()
    except ConfigError:
        raise
    except Exception as error:  # anyone's
        found = scrubbed(f"{type(error).__name__}: {error}")
        raise ConfigError("the callback cannot be made", where=name, found=found) from error
    if not isinstance(callback, Callback):
        expected = "a subclass of xmc_ray.Callback, or an object of one"
        raise ConfigError("not a callback", where=name, found=type(callback).__name__, expected=expected)
    return callback


def _failure(callback: Callback, hook: Hook, error: BaseException) -> str:
    """A line."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = scrubbed(f"{type(error).__name__}: {first}")
    return f"warning: callback {type(callback).__name__} is not called any more: {hook} raised {text}"

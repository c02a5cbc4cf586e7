"""What callbacks are given."""

from xmc_ray import Callback
from xmc_ray.callbacks.callback import Run, Trained, flat


def test_settings_are_flat_and_without_what_is_none() -> None:
    values = {"loop": {"epochs": 3, "minutes": None}, "fields": {}, "callbacks": ["mlflow"], "seed": 0}
    assert flat(values) == {"loop.epochs": 3, "callbacks": ["mlflow"], "seed": 0}
    assert flat({"calibration": {"ECE@5": 0.1}}, "/") == {"calibration/ECE@5": 0.1}


def test_every_run_has_an_id_of_its_own() -> None:
    one, other = (Run(name="x", settings={}) for _ in range(2))
    assert one.id != other.id and len(one.id) == 32 and not one.resumed


def test_every_hook_may_be_left_out() -> None:
    callback = Callback()
    callback.on_train_start(Run(name="x", settings={}))
    callback.on_log(1, {})
    callback.on_validation(1, {})
    callback.on_checkpoint(1, "x")
    callback.on_train_end(Trained(metrics={}))
    callback.on_exception(ValueError())

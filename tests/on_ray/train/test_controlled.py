"""What Ray Train's controller is given: light, and with an eye for errors that another attempt would meet again."""

import pickle
import subprocess
import sys

import pytest

from xmc_ray.errors import DataError, UnavailableError
from xmc_ray.on_ray.train.controlled import EndAtOnce, work


def test_an_error_of_ours_ends_training_unless_it_may_pass() -> None:
    callback = EndAtOnce()
    callback.after_exception(None, {0: RuntimeError("a node is gone"), 1: UnavailableError("no answer")})
    with pytest.raises(DataError, match="the cache has changed"):
        callback.after_exception(None, {0: RuntimeError("a node is gone"), 1: DataError("the cache has changed")})


def test_what_the_controller_unpickles_imports_no_model() -> None:
    frozen = pickle.dumps((work, EndAtOnce())).hex()
    script = f"""
import pickle, sys
pickle.loads(bytes.fromhex("{frozen}"))
assert not {{"torch", "transformers", "xmc_ray.on_ray.train.worker"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

"""Trials side by side: who judges them, and how they end; what they reach is in the tests of the tuning job."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from xmc_ray.on_ray.train import trials


def test_judges_are_drawn_from_all_over_the_held_out_documents() -> None:
    """They lie in the order of the files, such as one language after the other."""
    tables = [pa.table({"tokens": [[number]] * 4096, "labels": [[0]] * 4096}) for number in range(40)]
    cache = SimpleNamespace(
        some=lambda split, documents: np.arange(min(40, documents // 4096)) * 40 // min(40, documents // 4096),
        chunks=lambda split, numbers: (tables[number] for number in numbers),
    )
    drawn: Any = trials._some(SimpleNamespace(tokens=cache), "validation", 4096)  # type: ignore[arg-type]
    found = drawn["tokens"].combine_chunks().flatten().to_numpy()
    assert len(drawn) == 4096 and len(np.unique(found)) == 16 and np.bincount(found).max() < 400


def test_ctrl_c_ends_the_job_and_not_its_trials_alone() -> None:
    """Ray Tune's own handler of SIGINT would end all trials, and the job would go on with what they had reached."""
    script = (
        "import os, signal, sys\n"
        "from types import SimpleNamespace\n"
        "from ray.tune.tune import _setup_signal_catching\n"
        "from xmc_ray.exits import run_and_exit\n"
        "from xmc_ray.training.fit import FitConfig\n"
        "from xmc_ray.on_ray.train import trials\n"
        "def fit():\n"
        "    _setup_signal_catching()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "trials.ray.tune.Tuner = lambda *_, **__: SimpleNamespace(fit=fit)\n"
        "trials.prepare = trials.slots = lambda *_: None\n"
        "trials.ray.tune.with_parameters = lambda function, **_: function\n"
        "training = SimpleNamespace(workers=trials.WorkersConfig())\n"
        "recipes = [trials.Candidate('words', '', FitConfig())]\n"
        "run_and_exit(lambda: trials.tried(training, trials.Round(recipes, 1, 1.0), '/nowhere'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130 and ended.stderr.splitlines()[-1].startswith("error: ended by SIGINT"), ended.stderr

"""Trials side by side: who judges them, and how they end; what they reach is in the tests of the tuning job."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from xmc_ray.data.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.data.labels import LabelIndex
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.on_ray.train import trials
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig


def test_a_trial_groups_labels_by_the_documents_that_it_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[number % 40, 40 + number % 7] for number in range(400)]
    table = pa.table({name: pa.array(rows, pa.list_(pa.int32())) for name in ("tokens", "labels")})
    cache = SimpleNamespace(some=lambda *_: [0], chunks=lambda *_: [table])
    labels = LabelIndex.count([pa.array([[str(label) for label in row] for row in rows])])
    prepared: Any = SimpleNamespace(tokens=cache, labels=labels, tokenizer=SimpleNamespace(fields=[]))
    config = FitConfig(
        encoder=EncoderConfig(layers=0),
        lexical=LexicalConfig(width=8, columns=256, rarest=1),
        groups=GroupsConfig(max_size=4),
        loop=LoopConfig(epochs=2, precision="float32"),
    )
    read: list[int] = []
    told: list[dict[str, Any]] = []

    def grouped(config: GroupsConfig, tokens: Any, *given: Any) -> LabelGroups:
        read.extend(map(len, tokens))
        return group_labels(config, tokens, *given)

    monkeypatch.setattr(trials, "group_labels", grouped)
    monkeypatch.setattr(trials.ray.tune, "report", told.append)
    record, before = str(tmp_path / "words.json"), torch.get_num_threads()
    try:
        trials._trial({"number": 0}, configs=[config], prepared=prepared, documents=100, records=[record], device="cpu")
    finally:
        torch.set_num_threads(before)
    assert read == [100] and told[-1]["documents"] == 100 and json.loads(Path(record).read_text())["figures"]


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
        "trials.slots = lambda *_: None\n"
        "trials.ray.tune.with_parameters = lambda function, **_: function\n"
        "recipes = [trials.Candidate('words', '', FitConfig())]\n"
        "run_and_exit(lambda: trials.tried(None, trials.WorkersConfig(), trials.Round(recipes, 1, 1.0), '/nowhere'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130 and ended.stderr.splitlines()[-1].startswith("error: ended by SIGINT"), ended.stderr

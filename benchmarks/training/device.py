"""Waits and launches, by line: how often the host waits for a GPU in a step and in a batch of prediction, and what it launches.

No GPU is needed: a device of the tests (`tests/support/mimic.py`) claims to be one, computes on the CPU, and counts. It is
built once, by g++. Shapes are those of the benchmark `gpu`: BERT-base, 64 documents, 670 K labels in 8,192 groups, 75 of them
shortlisted, a bfloat16 table, features of 5 layers. Documents of 8 tokens and label vectors of 8 numbers change no count.

Launches are counted as CUDA makes them (`mimic.py` says how, and what it leaves out), by line and by operation. The total of a
step is also printed as it was counted before decision 0039: attention by its parts, lists of tensors one by one.

``--rev COMMIT`` measures the library of that commit instead, by the same script.

Bars: at most 4 waits a step and 2 a batch of prediction; a third of the 3,560 launches that were counted in a step before
decision 0034; 1,023 groups in a call.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WAITS_BAR, PREDICTION_BAR, LAUNCHES_BAR, GROUPS_BAR = 4, 2, 3560 // 3, 1023
STEPS, LABELS, GROUPS, DOCUMENTS, TOKENS = 3, 670_091, 8_192, 64, 8


def of_commit(commit: str) -> int:
    """This script in a copy of the library as that commit has it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "xmc_ray"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
        return subprocess.run([sys.executable, __file__], env=environment, cwd=folder).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", help="a commit whose library is measured")
    arguments = parser.parse_args()
    if shutil.which("g++") is None:
        print("device: no g++ here, which builds the device of the tests", file=sys.stderr)
        return 2
    if arguments.rev:
        return of_commit(arguments.rev)
    sys.path.append(str(ROOT / "tests" / "support"))
    import mimic  # type: ignore[import-not-found]  # claims torch's slot for foreign devices: not before it is wanted
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import BertConfig, BertModel

    from benchmarks.frame import verdict
    from benchmarks.inputs import even_groups, synthetic_batches
    from xmc_ray.model.encoder import TextEncoder
    from xmc_ray.model.lightxml import LightXML, ModelConfig
    from xmc_ray.model.predict import PredictConfig, predict
    from xmc_ray.training.loop import LoopConfig, TrainState, train
    from xmc_ray.training.optim import OptimConfig

    torch.manual_seed(0)
    transformer = BertModel(BertConfig(), add_pooling_layer=False)
    words: Any = transformer.get_input_embeddings()
    words.sparse, words.padding_idx = True, None  # as `fit.build_model` does
    config = ModelConfig(shortlist=75, bottleneck=8, table="bfloat16")
    groups, batches = even_groups(LABELS, GROUPS), synthetic_batches(LABELS, STEPS + 1, DOCUMENTS, TOKENS, 5)
    model = LightXML(TextEncoder(transformer, 5, "first"), groups, config).to("mimic:0")
    tokens = pa.array(list(np.random.default_rng(0).integers(1000, 30_000, (DOCUMENTS, TOKENS), np.int32)))

    def counted() -> tuple[Any, Any]:
        """What the device heard in some steps, and in a batch of prediction."""
        loop = LoopConfig(epochs=1, precision="bfloat16")
        steps = train(TrainState.start(model, OptimConfig()), model, lambda _: batches, STEPS + 1, loop)
        next(steps)  # the first one settles scales, once
        with mimic.listening() as training:
            assert len(list(steps)) == STEPS
        with mimic.listening() as prediction:
            predict(model, tokens.cast(pa.list_(pa.int32())), 5, PredictConfig(precision="bfloat16"))
        return training, prediction

    holds, figures = True, []
    for card, capability in (("H100", mimic.H100), ("L4", mimic.L4)):
        mimic.become(capability)
        try:
            training, prediction = counted()
            with mimic.apart():
                apart = counted()[0].launches.total() / STEPS
        except RuntimeError as error:
            print(f"\n== {card}: raises: {str(error).splitlines()[0]}")
            holds = False
            continue
        print(f"\n== {card}: a step\n{training.table(STEPS)}\n{apart:10.2f}  launches as counted before decision 0039")
        print(f"\n== {card}: a step, by operation\n{training.operations(STEPS)}")
        print(f"\n== {card}: a batch of prediction\n{prediction.table()}")
        waits, launches = training.waits.total() / STEPS, training.launches.total() / STEPS
        most = max(training.most_groups, prediction.most_groups)
        waited = f"{waits:.0f} and {prediction.waits.total()} waits"
        figures.append(f"{card} {waited}, {launches:,.0f} launches ({apart:,.0f} as counted before), {most:,} groups")
        holds &= waits <= WAITS_BAR and prediction.waits.total() <= PREDICTION_BAR
        holds &= launches <= LAUNCHES_BAR and most <= GROUPS_BAR
    print()
    verdict("device", "; ".join(figures), f"{WAITS_BAR} and {PREDICTION_BAR}, {LAUNCHES_BAR:,}, {GROUPS_BAR:,}", holds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

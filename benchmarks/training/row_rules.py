"""Which rule should update recall head and label table: quality after one pass over the same documents.

Every rule sees the same model, batches and schedule; encoder and bottleneck keep AdamW and the learning rates of
xmc_ray/recipes/small-cpu.toml. Only the rows' rule and the peak of its learning rate change. State is per row of H numbers:

    adagrad    row-wise Adagrad (`optim.RowAdagrad`)                      4 bytes
    sgd        no momentum, decoupled decay                               0 bytes
    lazy-adam  one second moment a row, no first moment, decayed by the
               number of steps since the row was last touched             8 bytes
    adamw      dense AdamW over all rows: what the others replace        8 bytes a number, all rows in every step

A run's line is appended to ``--log`` when it ends; runs found there are not repeated. Two data sets run side by side, one
thread each. Bar: the library's rule loses at most half a point of P@1 on the best rule, on every data set.
"""

import argparse
import json
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, Split, held_out, require, small_transformer, training_split
from xmc_ray.metrics.at_k import Metrics
from xmc_ray.model.predict import predict
from xmc_ray.model.sharding import OwnedRows
from xmc_ray.training.fit import epoch_plan
from xmc_ray.training.loop import TrainState, train
from xmc_ray.training.optim import RowAdagrad

RATES = {
    "adagrad": (8e-2, 2e-2, 3e-1),
    "sgd": (4.0, 16.0, 1.0),
    "lazy-adam": (5e-3, 2e-2, 1.25e-3),
    "adamw": (5e-3, 2e-2, 1.25e-3),
}
SHOWN = ("P@1", "P@3", "P@5", "PSP@5")
BAR = 0.5


class Sgd(RowAdagrad):
    """Plain gradient descent."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for head in self.heads.values():
            for groups, weight, bias in ((part.groups, part.weight, part.bias) for part in head.gradients()):
                head.weight[groups] = (1 - lr * self.decay) * head.weight[groups] - lr * weight
                head.bias[groups] -= lr * bias


class LazyAdam(RowAdagrad):
    """Adam's second moment, one a row, decayed for the steps that a row was left out of; no first moment."""

    def __init__(self, heads: Mapping[str, OwnedRows], decay: float, beta: float = 0.999) -> None:
        super().__init__(heads, decay)
        self.beta, self.time = beta, 0
        self.last = {name: torch.zeros_like(head.bias, dtype=torch.int32) for name, head in heads.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.time += 1
        for name, head in self.heads.items():
            for groups, weight, bias in ((part.groups, part.weight, part.bias) for part in head.gradients()):
                fresh = (weight.square().sum(-1) + bias.square()) / (weight.shape[-1] + 1)
                kept = self.beta ** (self.time - self.last[name][groups]).float()
                square = kept * self.square[name][groups] + (1 - self.beta) * fresh
                self.square[name][groups], self.last[name][groups] = square, self.time
                scale = lr / ((square / (1 - self.beta**self.time)).sqrt() + 1e-8)
                head.weight[groups] = (1 - lr * self.decay) * head.weight[groups] - scale[..., None] * weight
                head.bias[groups] -= scale * bias


class DenseAdamW(RowAdagrad):
    """PyTorch's AdamW over all rows, with the gradient written out as a whole."""

    def __init__(self, heads: Mapping[str, OwnedRows], decay: float) -> None:
        super().__init__(heads, decay)
        weights, biases = [head.weight for head in heads.values()], [head.bias for head in heads.values()]
        groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for head in self.heads.values():
            head.weight.grad, head.bias.grad = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
            for groups, weight, bias in ((part.groups, part.weight, part.bias) for part in head.gradients()):
                head.weight.grad[groups], head.bias.grad[groups] = weight, bias
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()


class AtRate(RowAdagrad):
    """``rule`` at ``times`` the learning rate of the other heads."""

    def __init__(self, rule: RowAdagrad, times: float) -> None:
        super().__init__({}, 0.0)
        self.rule, self.times = rule, times

    def step(self, lr: float) -> None:
        self.rule.step(self.times * lr)


RULES = {"adagrad": RowAdagrad, "sgd": Sgd, "lazy-adam": LazyAdam, "adamw": DenseAdamW}


def quality(split: Split, test: pa.Table, rule: str, rate: float) -> dict[str, float]:
    """Metrics in percent after one epoch, and the seconds it took."""
    config = small_transformer()
    model = split.model(config)
    state = TrainState.start(model, config.optim)
    state.optimizer.rows = AtRate(RULES[rule](model.heads, config.optim.weight_decay), rate / config.optim.rows_lr)
    started = time.monotonic()
    plan = epoch_plan(config.loop, len(split.table))
    for _ in train(state, model, lambda first: split.batches(config.loop, first=first), plan.steps, config.loop):
        pass
    seconds, metrics = time.monotonic() - started, Metrics(split.index.counts, split.index.n_documents)
    _, labels = predict(model, test["tokens"].combine_chunks(), max(metrics.ks), config.loop.prediction)
    metrics.update(labels, test["labels"].combine_chunks())
    total = metrics.result()["total"]
    return {name: 100 * total[name] for name in SHOWN} | {"seconds": seconds}


def run_all(folder: Path, documents: int | None, rates_a_rule: int, log: Path) -> None:
    torch.set_num_threads(1)
    done = {key(run) for run in runs_of(log)}
    split = training_split(folder, small_transformer(), documents)
    test = held_out(folder, split)
    for place in range(rates_a_rule):
        for rule, rates in RATES.items():
            run = {"data": folder.name, "documents": len(split.table), "rule": rule, "rate": rates[place]}
            if key(run) not in done:
                line = json.dumps(run | quality(split, test, rule, rates[place]))
                with log.open("a") as file:
                    file.write(line + "\n")


def key(run: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(run[name] for name in ("data", "documents", "rule", "rate"))


def runs_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that the data sets are in")
    parser.add_argument("--sets", nargs="+", default=["tate", "debian-deps"], help="names of data sets in it")
    parser.add_argument("--documents", type=int, nargs="+", default=[8_000, 4_000], help="first training documents of each")
    parser.add_argument("--rates", type=int, default=3, help="how many of each rule's learning rates")
    parser.add_argument("--log", type=Path, default=Path("runs/row-rules.jsonl"), help="where finished runs are kept")
    arguments = parser.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    sets = [(require(arguments.data / name), n) for name, n in zip(arguments.sets, arguments.documents, strict=True)]
    workers = [get_context("spawn").Process(target=run_all, args=(*one, arguments.rates, arguments.log)) for one in sets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a run failed; finished ones are kept")

    lost = []
    for name in arguments.sets:
        runs = [run for run in runs_of(arguments.log) if run["data"] == name]
        print(
            f"{name}, {runs[0]['documents']:,} documents\n{'rule':12}{'rate':>9}"
            + "".join(f"{s:>8}" for s in (*SHOWN, "seconds"))
        )
        for run in sorted(runs, key=lambda run: (list(RULES).index(run["rule"]), run["rate"])):
            print(f"{run['rule']:12}{run['rate']:9.3g}" + "".join(f"{run[column]:9.2f}" for column in (*SHOWN, "seconds")))
        best = {rule: max((run["P@1"] for run in runs if run["rule"] == rule), default=0.0) for rule in RULES}
        lost.append(max(best.values()) - best["adagrad"])
    verdict("row-rules", f"{max(lost):.2f} points of P@1 behind the best rule", f"{BAR}", max(lost) <= BAR)


if __name__ == "__main__":
    main()

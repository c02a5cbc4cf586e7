"""Two and three data-parallel processes do what one does with the same global batches."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from families import changed, edit_weights
from torch import Tensor
from toys import documents, on_workers, toy_model, whole_parameters

from xmc_ray.data.groups import LabelGroups
from xmc_ray.errors import ModelError
from xmc_ray.model.batch import Batch, make_batch
from xmc_ray.model.encoder import EncoderConfig, build_encoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.training.fit import check_encoders
from xmc_ray.training.loop import LoopConfig, TrainState, data_parallel, train
from xmc_ray.training.optim import OptimConfig

STEPS = 20
WORLDS = (1, 2, 3)
PREDICTED = PredictConfig(token_budget=40)  # a batch of several documents a worker, and several batches


@dataclass(frozen=True)
class Case:
    """A training of `STEPS` steps, and what differs from the plainest one."""

    n_labels: int = 12
    n_groups: int = 7
    accumulate: int = 1
    frozen: bool = False
    transformer: bool = False
    lexical: bool = False
    lift: float = 0.0
    judged: bool = False


CASES = {
    "seven groups": Case(),
    "flat": Case(n_groups=12),
    "fewer groups than workers": Case(n_groups=2),
    "micro-batches": Case(accumulate=2),
    "rows alone": Case(n_groups=12, frozen=True),
    "many labels": Case(n_labels=3000, n_groups=700),
    "transformer": Case(transformer=True),
    "lexical": Case(lexical=True, accumulate=2),
    "lifted": Case(n_groups=12, lift=1.0),
    "judged": Case(judged=True, accumulate=2),
    "judged, flat": Case(n_groups=12, judged=True),
}


def global_batches() -> list[list[int]]:
    """Documents of each step: 13 of them, so that shares are unequal, and every fifth batch is a short one of 7."""
    rng = np.random.default_rng(0)
    return [rng.permutation(64)[: 7 if step % 5 == 4 else 13].tolist() for step in range(STEPS)]


def build(case: Case, exchange: Exchange, encoder: Path) -> LightXML:
    groups = LabelGroups(np.arange(case.n_labels) % case.n_groups)
    if not case.transformer:
        model = toy_model(groups, exchange=exchange, lexical=case.lexical, lift=case.lift)
    else:
        torch.manual_seed(0)
        pretrained = build_encoder(EncoderConfig(name=str(encoder), feature_layers=2, dropout=0.0), Tokenizer.load(encoder, 24))
        model = LightXML(pretrained, groups, ModelConfig(shortlist=2, bottleneck=8, dropout=0.0), exchange)
    if case.lift:
        model.start_from_counts(np.arange(case.n_labels) % 5, 61)
    if case.judged:
        model.judged_weight = 3.0
    if case.frozen:
        model.encoder.requires_grad_(False)
    return model


def train_case(exchange: Exchange, case: Case, encoder: Path) -> dict[str, Any]:
    """Parameters, steps, bytes sent a step, and predictions afterwards."""
    table = documents()
    columns = [table[name].combine_chunks() for name in ("tokens", "labels")]
    if case.judged:  # right and wrong ones of half of the documents
        rows = [sorted({row % 12, labels[0]}) if row % 2 else [] for row, labels in enumerate(table["labels"].to_pylist())]
        columns.append(pa.array(rows, pa.list_(pa.int32())))

    def share(rows: list[int]) -> Batch:
        return make_batch(*(column.take(pa.array(rows[exchange.rank :: exchange.world])) for column in columns))

    model = build(case, exchange, encoder)
    rate = 0.002 if case.transformer else 0.05
    state = TrainState.start(model, OptimConfig(encoder_lr=rate, head_lr=0.05, rows_lr=0.04, clip_norm=0.1))
    config, sent, steps = LoopConfig(epochs=1, accumulate=case.accumulate), [], []
    for step in train(state, data_parallel(model), lambda _: map(share, global_batches()), STEPS, config):
        steps.append(step)
        sent.append(dict(exchange.sent))
        exchange.sent.clear()
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "steps": steps,
        "sent": sent,
        "predicted": predict(model, columns[0], 4, PREDICTED),
    }


def train_cases(exchange: Exchange, encoder: Path) -> dict[str, dict[str, Any]]:
    """All cases, one after the other."""
    results = {}
    for name, case in CASES.items():
        exchange.sent = {}
        results[name] = train_case(exchange, case, encoder)
    return results


Results = dict[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each worker had of each case, by the number of workers."""
    alone = {1: [train_cases(Exchange(), tiny_encoder)]}
    return alone | on_workers(WORLDS[1:], train_cases, tmp_path_factory.mktemp("workers"), tiny_encoder)


def of_case(results: Results, name: str, world: int) -> list[dict[str, Any]]:
    return [by_case[name] for by_case in results[world]]


def parameters(results: Results, name: str, world: int) -> dict[str, Tensor]:
    """The whole model's."""
    whole = whole_parameters([part["parameters"] for part in of_case(results, name, world)])
    # A softmax does not see a bias that all keys share: its gradient is rounding noise, which Adam blows up.
    return {name: tensor for name, tensor in whole.items() if not name.endswith("key.bias")}


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_workers_changes_neither_losses_nor_parameters(results: Results, name: str, world: int) -> None:
    (alone,), together = of_case(results, name, 1), of_case(results, name, world)
    for kind in ("recall_loss", "rank_loss", "documents", "tokens", "progress"):
        expected = [getattr(step, kind) for step in alone["steps"]]
        for worker in together:
            assert [getattr(step, kind) for step in worker["steps"]] == pytest.approx(expected, rel=1e-4, abs=1e-6), kind
    assert alone["steps"][-1].loss < 0.9 * alone["steps"][0].loss
    torch.testing.assert_close(parameters(results, name, world), parameters(results, name, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_same_dense_part_and_rows_of_its_own(results: Results, name: str, world: int) -> None:
    first, *others = (worker["parameters"] for worker in of_case(results, name, world))
    for other in others:
        for key, tensor in first.items():
            if not key.startswith(("recall.", "table.")):
                assert torch.equal(tensor, other[key]), key
    rows = [len(worker["recall.bias"]) for worker in (first, *others)]
    assert rows == [len(Exchange(rank, world).share(CASES[name].n_groups)) for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_micro_batches_end_at_the_parameters_of_whole_batches(results: Results, world: int) -> None:
    assert CASES["micro-batches"] == replace(CASES["seven groups"], accumulate=2)
    parts, whole = (parameters(results, name, world) for name in ("micro-batches", "seven groups"))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_predictions_of_all_documents(results: Results, name: str, world: int) -> None:
    ((scores, labels),) = (worker["predicted"] for worker in of_case(results, name, 1))
    for worker in of_case(results, name, world):
        np.testing.assert_allclose(worker["predicted"][0], scores, rtol=1e-3, atol=1e-5)
        agree = worker["predicted"][1] == labels
        apart = np.abs(np.diff(scores, append=0.0)) > 1e-4  # scores that are all but equal may change places
        assert agree[apart & np.roll(apart, 1, axis=1)].all()
        assert agree.mean() > 0.95


@pytest.mark.parametrize("world", WORLDS[1:])
def test_what_a_step_sends_does_not_depend_on_the_number_of_labels(results: Results, world: int) -> None:
    for few, many in zip(of_case(results, "seven groups", world), of_case(results, "many labels", world), strict=True):
        assert few["sent"] == many["sent"]
        assert set(few["sent"][0]) == {
            *("counts", "features", "feature gradients", "shortlists", "true labels", "dense gradients", "word gradients")
        }


@pytest.mark.parametrize("world", WORLDS[1:])
def test_words_of_the_step_are_sent_and_not_the_vocabulary(results: Results, world: int) -> None:
    worker = of_case(results, "transformer", world)[0]
    sizes = {name: tensor.nbytes for name, tensor in worker["parameters"].items()}
    words = next(size for name, size in sizes.items() if "word_embeddings" in name)
    for sent in worker["sent"]:
        assert 0 < sent["word gradients"] < (world - 1) * words / 4
        assert sent["dense gradients"] <= 2 * (sum(sizes.values()) - words) * (world - 1) / world


def test_one_worker_sends_nothing(results: Results) -> None:
    assert all(sent == {} for case in results[1][0].values() for sent in case["sent"])


def test_workers_start_alike_in_all_that_is_not_divided(tmp_path: Path) -> None:
    """Vectors of words and terms, and frozen ones, are left out of DDP's first broadcast: replicas differed in silence."""
    first, *others = on_workers((3,), start_apart, tmp_path)[3]
    assert {"encoder.vectors.weight", "encoder.mix.weight", "lexical.vectors.weight", "bottleneck.weight"} <= set(first)
    for other in others:
        assert all(
            torch.equal(tensor, other[name]) for name, tensor in first.items() if not name.startswith(("recall.", "table."))
        )


def start_apart(exchange: Exchange) -> dict[str, Tensor]:
    model = toy_model(exchange=exchange, seed=exchange.rank, lexical=True)
    model.encoder.mix.requires_grad_(False)  # type: ignore[union-attr,operator]
    data_parallel(model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_workers_with_different_encoders_of_one_name_are_an_error(tiny_encoder: Path, tmp_path: Path) -> None:
    """As with two revisions in the caches of two machines. All workers raise it, so that none waits for the others."""
    for rank in range(2):
        changed(tiny_encoder, tmp_path / str(rank) / "encoder", lambda it: edit_weights(it, nudge) if rank else None)  # noqa: B023
    found = on_workers((2,), load_by_name, tmp_path, tmp_path)[2]
    assert found[0]["digests"] != found[1]["digests"]
    for worker in found:
        assert worker["same"] == ""
        assert "different encoders; found another one than the driver's on 1 of 2 workers" in worker["different"]


def nudge(weights: dict[str, Tensor]) -> None:
    weights["embeddings.word_embeddings.weight"][7, 0] += 1e-3


def load_by_name(exchange: Exchange, folder: Path) -> dict[str, str]:
    os.chdir(folder / str(exchange.rank))
    own = build_encoder(EncoderConfig(name="encoder", feature_layers=2), Tokenizer.load("encoder", 24)).digest()
    os.chdir(folder / "0")
    drivers = build_encoder(EncoderConfig(name="encoder", feature_layers=2), Tokenizer.load("encoder", 24)).digest()
    told = {"digests": own}
    for name, digest in (("same", drivers), ("different", own)):
        try:
            check_encoders(digest, drivers, exchange, torch.device("cpu"))
            told[name] = ""
        except ModelError as error:
            told[name] = str(error)
    return told

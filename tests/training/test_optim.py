"""Optimisers, schedule and weight averaging."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import OPTIM, batch_of, pairs_of, toy_model

from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.recall import RecallHead
from xmc_ray.model.sharding import Exchange, OwnedRows, RowGradients, rounded
from xmc_ray.training.optim import (
    Averager,
    OptimConfig,
    Optimizer,
    RowAdagrad,
    VectorAdagrad,
    clip,
    gathered_sparse,
    learning_rate_factor,
)

STEADY = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04, warmup=0, decay=False, weight_decay=0.0)


class ScriptedRows(OwnedRows):
    """Rows whose gradients are given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(len(weight), Exchange())
        self.squares_H, self.documents = torch.full((weight.shape[-1],), 1 / weight.shape[-1]), 8
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(weight.shape[:-1]), requires_grad=False)
        self.due: list[RowGradients] = []

    def input_squares(self) -> tuple[Tensor, int]:
        return self.squares_H, self.documents

    def gradients(self) -> Iterator[RowGradients]:
        yield from self.due


def train_step(model: LightXML, optimizer: Optimizer, truth: list[list[int]], seed: int = 0) -> float:
    loss = sum(model(batch_of(np.random.default_rng(seed), truth)))
    loss.backward()
    optimizer.step(0.5)
    return float(loss.detach())


# -- schedule and groups of parameters -----------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    config = OptimConfig(warmup=0.1)
    factors = [learning_rate_factor(share / 100, config) for share in range(101)]
    assert factors[0] == 0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == max(factors) == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == 0
    assert learning_rate_factor(0.9, OptimConfig(warmup=0.1, decay=False)) == 1
    assert learning_rate_factor(0.0, OptimConfig(warmup=0.0)) == 1


def test_encoder_and_heads_have_rates_of_their_own_and_vectors_no_decay() -> None:
    model = toy_model(lexical=True)
    config = OptimConfig(encoder_lr=1e-3, head_lr=1e-1, rows_lr=1e-2, lexical_lr=1.0, warmup=0, decay=False)
    optimizer = Optimizer(model, config)
    train_step(model, optimizer, [[0, 3], [5]])
    assert optimizer.learning_rates() == {"encoder_lr": 1e-3, "head_lr": 1e-1, "lexical_lr": 1.0, "rows_lr": 1e-2}
    assert optimizer.adamw is not None and optimizer.lazy_adam is not None
    parameters = dict(model.named_parameters())
    groups = [*optimizer.adamw.param_groups, *optimizer.lazy_adam.param_groups]
    found = {
        name: (group["lr"], group.get("weight_decay", 0))
        for group in groups
        for member in group["params"]
        for name, parameter in parameters.items()
        if parameter is member
    }
    assert found == {
        "encoder.vectors.weight": (1e-3, 0),
        "encoder.mix.weight": (1e-3, 0.01),
        "encoder.mix.bias": (1e-3, 0),
        "lexical.mix.weight": (1e-1, 0.01),
        "lexical.mix.bias": (1e-1, 0),
        "bottleneck.weight": (1e-1, 0.01),
        "bottleneck.bias": (1e-1, 0),
    }
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_part_learns_and_follows_the_schedule() -> None:
    model = toy_model()
    optimizer, before = Optimizer(model, STEADY), deepcopy(model.state_dict())
    optimizer.config = OptimConfig(warmup=0, encoder_lr=0.05, head_lr=0.05, rows_lr=0.04)
    losses = model(batch_of(np.random.default_rng(0), [[0, 3], [5]]))
    (losses.recall + losses.rank).backward()
    optimizer.step(progress=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "a rate of 0 moves nothing"
    train_step(model, optimizer, [[0, 3], [5]])
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]


def test_rows_have_a_rate_of_their_own() -> None:
    model = toy_model()
    before = deepcopy(model.state_dict())
    still = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.0, warmup=0)
    train_step(model, Optimizer(model, still), [[0, 3], [5]])
    stayed = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert stayed == {"recall.weight", "recall.bias", "table.weight", "table.bias"}


def test_frozen_parameters_stay() -> None:
    model = toy_model()
    assert model.encoder is not None
    model.encoder.requires_grad_(False)
    before = deepcopy(model.encoder.state_dict())
    optimizer = Optimizer(model, OptimConfig(head_lr=0.1, rows_lr=0.1))
    train_step(model, optimizer, [[0, 3], [5]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert optimizer.lazy_adam is None and set(optimizer.dense) == {"bottleneck.weight", "bottleneck.bias"}
    assert set(optimizer.learning_rates()) == {"head_lr", "rows_lr"}


# -- clipping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "factor"), [(13.0, 1.0), (20.0, 1.0), (6.5, 0.5), (0.0, 1.0)])
def test_clipping_takes_dense_and_sparse_gradients_together(norm: float, factor: float) -> None:
    """Lengths 5 and 12 are 13 together."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = torch.sparse_coo_tensor([[3]], [[0.0, 12.0]], (4, 2), check_invariants=True).coalesce()
    clip(parameters, 13.0, norm)
    assert parameters[0].grad.tolist() == pytest.approx([3 * factor, 4 * factor])
    assert parameters[1].grad.to_dense()[3].tolist() == pytest.approx([0, 12 * factor])
    assert parameters[2].grad is None


def test_encoder_and_heads_are_clipped_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms = toy_model(), []
    optimizer = Optimizer(model, OptimConfig(clip_norm=0.01))

    def look() -> None:
        for part in (model.encoder, model.bottleneck):
            gradients = [parameter.grad for parameter in part.parameters()]  # type: ignore[union-attr]
            values = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]  # type: ignore[union-attr]
            norms.append(float(nn.utils.get_total_norm(values)))

    monkeypatch.setattr(optimizer.adamw, "step", look)
    train_step(model, optimizer, [[0, 3], [5]])
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


# -- word vectors --------------------------------------------------------------------------------------------------------


def test_words_of_the_step_move_as_under_adam_and_no_others() -> None:
    lazy, eager = toy_model(), toy_model()
    eager.encoder.vectors.sparse = False
    before = lazy.encoder.vectors.weight.detach().clone()
    batch = batch_of(np.random.default_rng(0), [[0, 3], [5]])
    for model in (lazy, eager):
        train_step(model, Optimizer(model, STEADY), [[0, 3], [5]])
    seen = torch.unique(batch.tokens_BT)  # the padded ones have a gradient of zero
    unseen = [word for word in range(len(before)) if word not in seen.tolist()]
    after = lazy.encoder.vectors.weight.detach()
    torch.testing.assert_close(after, eager.encoder.vectors.weight.detach(), rtol=1e-4, atol=1e-5)
    assert unseen and torch.equal(after[unseen], before[unseen])
    assert (after[batch.tokens_BT[batch.mask_BT]] != before[batch.tokens_BT[batch.mask_BT]]).any(1).all()


def test_a_word_seen_twice_has_one_gradient() -> None:
    gradient = torch.sparse_coo_tensor([[4, 1, 4]], [[1.0], [2.0], [3.0]], (6, 1), check_invariants=True)
    gathered = gathered_sparse(gradient, Exchange())
    assert gathered.indices().tolist() == [[1, 4]]
    assert gathered.values().tolist() == [[2.0], [4.0]]


# -- vectors with sparse gradients ---------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5]))
@settings(max_examples=30, deadline=None)
def test_vectors_that_were_seen_move_as_the_twin_says(seed: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = nn.Parameter(torch.randn(6, 3, generator=generator))
    adagrad = VectorAdagrad({"vectors": vectors}, power)
    slow, squares = vectors.tolist(), [0.0] * 6
    for _ in range(3):
        places = torch.randperm(6, generator=generator)[:4].sort().values
        gradient = torch.randn(4, 3, generator=generator)
        vectors.grad = torch.sparse_coo_tensor(places[None], gradient, vectors.shape).coalesce()
        adagrad.step(0.3)
        reference.vector_adagrad(slow, squares, dict(zip(places.tolist(), gradient.tolist(), strict=True)), 0.3, power)
        assert vectors.grad is None
    torch.testing.assert_close(vectors.detach(), torch.tensor(slow), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adagrad.square["vectors"], torch.tensor(squares), rtol=1e-4, atol=1e-6)
    adagrad.step(0.3)  # nothing is due


# -- row-wise Adagrad ----------------------------------------------------------------------------------------------------


@st.composite
def scripts(draw: Any) -> tuple[tuple[int, ...], list[list[int]], int]:
    """Shape of the rows, and which groups have a gradient in each of a few steps; none, some or all."""
    n_groups, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    shape = draw(st.sampled_from([(n_groups, 3), (n_groups, 2, 3)]))
    return shape, draw(st.lists(st.lists(st.integers(0, n_groups - 1), unique=True), min_size=1, max_size=5)), seed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scripts(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.01, 1.0, 50.0]), st.integers(0, 3))
def test_rows_move_as_in_the_slow_twin_and_only_where_touched(
    script: tuple[tuple[int, ...], list[list[int]], int], decay: float, power: float, steady: int
) -> None:
    shape, touched, seed = script
    torch.manual_seed(seed)
    head = ScriptedRows(torch.randn(shape))
    head.squares_H, head.steady = torch.tensor([0.9, 0.02, 0.08]) * power, steady
    by = reference.input_scale(head.squares_H.tolist(), steady)
    adagrad = RowAdagrad({"head": head}, decay)
    adagrad.step(0.3)  # without gradients, but with the inputs that give every row its start
    length = sum(square * scale**2 for square, scale in zip(head.squares_H.tolist(), by, strict=True))
    start = torch.full(shape[:-1], (length + min(1.0, 100 * length)) / head.documents**2)
    torch.testing.assert_close(adagrad.square["head"], start)
    for groups in touched:
        weight, bias = torch.randn(len(groups), *shape[1:]), torch.randn(len(groups), *shape[1:-1])
        before = [tensor.clone() for tensor in (head.weight, head.bias, adagrad.square["head"])]
        first, rest = slice(groups[0], groups[0] + 1) if groups else slice(0, 0), torch.tensor(groups[1:], dtype=torch.long)
        head.due = [
            RowGradients(first, weight[:1].clone(), bias[:1].clone()),
            RowGradients(rest, weight[1:].clone(), bias[1:].clone()),
        ]
        adagrad.step(0.3)
        for group in range(shape[0]):
            after = [tensor[group] for tensor in (head.weight, head.bias, adagrad.square["head"])]
            if group not in groups:
                assert all(torch.equal(one, tensor[group]) for one, tensor in zip(after, before, strict=True))
                continue
            place = groups.index(group)
            of_group = [*(tensor[group] for tensor in before), weight[place], bias[place]]
            shapes = ((-1, 3), (-1,), (-1,), (-1, 3), (-1,))  # a group may be one row
            each = [tensor.reshape(shape).tolist() for tensor, shape in zip(of_group, shapes, strict=True)]
            slow = [reference.row_adagrad(*row, 0.3, decay, length, by) for row in zip(*each, strict=True)]
            for one, values in zip(after, zip(*slow, strict=True), strict=True):
                torch.testing.assert_close(one, torch.tensor(values).view_as(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [LabelGroups(np.arange(12)), LabelGroups(np.arange(12) % 3)], ids=["flat", "groups"])
@pytest.mark.parametrize(("shorter", "longer"), [(2.0**-14, 2.0**-8), (2.0**10, 2.0**20)])
def test_rows_learn_the_same_from_inputs_of_any_length(groups: LabelGroups, shorter: float, longer: float) -> None:
    """Paper's recipe: the first steps moved a logit by the rate times the length of the features, times the root of their
    number. Inputs 2^n times as long have weights 2^-n times as long: among short ones, and among those beside which a bias
    does not count."""
    moved = []
    for by in (shorter, longer):
        model = toy_model(groups, bottleneck=16)
        generator = torch.Generator().manual_seed(0)
        for head in model.heads.values():
            head.weight.data /= by
        rows = RowAdagrad(model.heads, 0.1)
        for _ in range(4):
            features_BF, truth = by * torch.randn(5, 16, generator=generator), pairs_of([[0], [3, 4], [7], [11], [2]])
            _, shortlist_BK = model.recall.loss(features_BF, truth[0], model.group_L[truth[1]], 2, 5)
            if model.table is not None:
                model.table.loss(features_BF, shortlist_BK, *truth, 5)
            rows.step(0.02)
        moved.append({name: (head.weight * by, head.bias) for name, head in model.heads.items()})
    for name, tensors in moved[0].items():
        torch.testing.assert_close(moved[1][name], tensors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [16, 384, 3840])
@pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
def test_a_first_step_moves_a_logit_by_the_rate(width: int, length: float) -> None:
    """Whatever the number of features and their length: by the rate, in the logit of a label's one true document."""
    features_BF = torch.nn.functional.normalize(torch.randn(8, width, generator=torch.Generator().manual_seed(0))) * length
    recall = RecallHead(width, 3, Exchange(), 0)
    recall.weight.data.zero_()
    recall.bias.data.fill_(-6)  # a rare label
    recall.loss(features_BF, torch.tensor([0]), torch.tensor([1]), 1, 8)
    RowAdagrad({"recall": recall}, 0.01).step(3.0 / 25)
    moved = recall.logits(features_BF)[0, 1].item() + 6
    assert 3.0 / 2 < moved < 3.0 * 2**0.5


def test_documents_without_a_label_hardly_move_its_row() -> None:
    """Row Adagrad that starts at 0 makes a whole step of any first gradient, however small."""
    features_BF = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    recall = RecallHead(64, 1000, Exchange(), 0)
    recall.weight.data.zero_()
    recall.bias.data.fill_(-9)  # rare labels, of which these documents have one
    rows = RowAdagrad({"recall": recall}, 0.0)
    for _ in range(10):
        recall.loss(features_BF, torch.tensor([0]), torch.tensor([1]), 1, 8)
        rows.step(0.08)
    fell = -9 - recall.logits(features_BF)[:, 2:].mean()
    assert 0 < fell < 0.01


def test_features_that_all_documents_share_do_not_drown_the_others() -> None:
    """BERT's last layers have a few features that are longer than all others together, and say nothing."""
    generator = torch.Generator().manual_seed(0)
    features_BF, moved = torch.randn(8, 64, generator=generator), {}
    features_BF[:, 0] = 100.0
    for steady in (0, 64):
        recall = RecallHead(64, 1000, Exchange(), 0)
        recall.weight.data.zero_()
        recall.bias.data.fill_(-9)
        recall.steady = steady
        recall.loss(features_BF, torch.tensor([0]), torch.tensor([1]), 1, 8)
        RowAdagrad({"recall": recall}, 0.0).step(0.08)
        moved[steady] = recall.logits(features_BF)[:, 1] + 9
    assert moved[0][1:].min() > 0.9 * moved[0][0]  # the label is as likely everywhere
    assert moved[64][0] > 1 and moved[64][1:].max() < 0.8 * moved[64][0]


def test_untouched_groups_stay_and_the_state_is_four_bytes_a_row() -> None:
    groups = LabelGroups(np.arange(400) % 40)
    model = toy_model(groups)
    optimizer = Optimizer(model, OptimConfig(head_lr=0.1, rows_lr=0.1, weight_decay=0.5, warmup=0))
    table, before = model.table, deepcopy(model.state_dict())
    assert table is not None
    train_step(model, optimizer, [[3, 4], [45]])
    moved = (table.weight != before["table.weight"]).flatten(1).any(1)
    assert moved[[3, 4, 5]].all()
    assert 3 <= moved.sum() <= 3 + 2 * model.shortlist
    assert torch.equal(table.bias[~moved], before["table.bias"][~moved])
    assert len(optimizer.rows.square["table"][~moved].unique()) == 1  # what all rows start with

    rows = sum(head.bias.numel() for head in model.heads.values())
    assert sum(square.nbytes for square in optimizer.rows.square.values()) == 4 * rows
    others = [*optimizer.adamw.state.values(), *optimizer.lazy_adam.state.values()]  # type: ignore[union-attr]
    assert max(value.numel() for state in others for value in state.values() if torch.is_tensor(value)) < rows
    assert all(parameter.grad is None for parameter in model.parameters())


# -- bfloat16 ------------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_right_on_average() -> None:
    torch.manual_seed(0)
    step_up = 2.0**-7  # from 1 to the next bfloat16
    for share in (0.0, 0.1, 0.5, 0.9):
        value = 1 + share * step_up
        for sign in (1.0, -1.0):
            draws = rounded(torch.full((20_000,), sign * value), torch.bfloat16).float()
            assert set(draws.tolist()) <= {sign, sign * (1 + step_up)}
            assert draws.mean().item() == pytest.approx(sign * value, abs=0.02 * step_up)


def test_what_bfloat16_can_hold_is_kept() -> None:
    values = torch.randn(1000).bfloat16().float()
    values[:4] = torch.tensor([0.0, torch.inf, -torch.inf, 1e-38])
    values = values.bfloat16().float()
    assert torch.equal(rounded(values, torch.bfloat16).float(), values)
    assert rounded(torch.tensor([torch.nan]), torch.bfloat16).isnan().all()
    exact = torch.randn(1000)
    assert torch.equal(rounded(exact, torch.float32), exact)


def test_updates_too_small_for_bfloat16_add_up() -> None:
    torch.manual_seed(0)
    heads = [ScriptedRows(torch.ones(1, 512, 8, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    for head in heads:
        adagrad = RowAdagrad({"head": head}, 0.0)
        for _ in range(50):
            head.due = [RowGradients(slice(0, 1), torch.ones(1, 512, 8), torch.ones(1, 512))]
            adagrad.step(1e-5)
    exact, half = (1 - head.weight.float().mean().item() for head in heads)
    assert 0 < exact < 2.0**-9, "rounding to the nearest would have lost every step"
    assert half == pytest.approx(exact, rel=0.1)


def test_a_table_in_bfloat16_learns_like_one_in_float32() -> None:
    final = {}
    for kind in ("float32", "bfloat16"):
        model = toy_model(LabelGroups(np.arange(12) % 3), table=kind)
        optimizer = Optimizer(model, STEADY)
        model.encoder.requires_grad_(False)
        losses = [train_step(model, optimizer, [[0, 3], [5], [7, 8]]) for _ in range(40)]
        assert losses[-1] < 0.5 * losses[0]
        final[kind] = losses[-1]
    assert final["bfloat16"] == pytest.approx(final["float32"], rel=0.1)


# -- averaging -----------------------------------------------------------------------------------------------------------


def averaged_model() -> tuple[LightXML, Averager, dict[str, Tensor]]:
    """A model after ten steps, its average of the weights from step 4 on, every second one, and the mean of those."""
    config = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04, swa_start=0.3, swa_every=2)
    model, averager, seen = toy_model(), Averager(config), []
    optimizer = Optimizer(model, config)
    for number in range(1, 11):
        train_step(model, optimizer, [[0, 3], [5]], seed=number)
        averager.update(model, number, number / 10)
        if number in (4, 6, 8, 10):
            seen.append(deepcopy(model.state_dict()))
    return model, averager, {name: torch.stack([state[name] for state in seen]).mean(0) for name in seen[0]}


def test_the_average_is_the_plain_mean_of_the_weights_seen() -> None:
    model, averager, mean = averaged_model()
    assert averager.count == 4
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with averager.in_use(model):
        torch.testing.assert_close(dict(model.state_dict()), mean, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    averager.keep(model)
    torch.testing.assert_close(dict(model.state_dict()), mean, rtol=1e-5, atol=1e-6)


def test_own_weights_return_after_an_error_and_training_goes_on_with_them() -> None:
    model, averager, _ = averaged_model()
    own, average = deepcopy(model.state_dict()), deepcopy(averager.averaged)
    with pytest.raises(RuntimeError, match="validation"), averager.in_use(model):
        raise RuntimeError("validation")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    train_step(model, Optimizer(model, OPTIM), [[0, 3], [5]])
    assert not torch.equal(model.table.weight, own["table.weight"])  # type: ignore[union-attr]
    assert all(torch.equal(tensor, average[name]) for name, tensor in averager.averaged.items())


def test_averaging_is_off_by_default() -> None:
    model, averager = toy_model(), Averager(OptimConfig())
    own = deepcopy(model.state_dict())
    for number in range(200):
        averager.update(model, number, number / 200)
    assert averager.averaged == {}
    with averager.in_use(model):
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_the_first_step_is_the_first_with_features() -> None:
    """Empty documents say nothing of the length of features: by a length of 0 every later step would be endless."""
    rows = ScriptedRows(torch.zeros(2, 1, 4))
    optimizer = RowAdagrad({"rows": rows}, 0.0)
    full, rows.squares_H = rows.squares_H, torch.zeros(4)
    rows.due = [RowGradients(torch.tensor([0]), torch.zeros(1, 1, 4), torch.ones(1, 1))]
    optimizer.step(0.1)
    assert optimizer.power == {} and not rows.bias.any() and not optimizer.square["rows"].any()
    rows.squares_H = full
    optimizer.step(0.1)
    assert optimizer.power["rows"] == pytest.approx(1) and -10 < rows.bias[0] < 0

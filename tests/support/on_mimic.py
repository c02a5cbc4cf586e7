"""What `tests/model/test_device.py` runs in a process of its own, where the device ``mimic`` stands for an accelerator."""

import inspect
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mimic
import mimic_jobs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from fruit import manifest_of, options, read_night
from mimic import DEVICE, H100, L4, T4
from torch import Tensor
from toys import documents, toy_model
from transformers import BertConfig, BertModel

from xmc_ray import (
    EncoderConfig,
    FitConfig,
    GroupsConfig,
    LexicalConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    XMCClassifier,
    command,
)
from xmc_ray.data.groups import LabelGroups
from xmc_ray.model import pairs, ranking, recall, sharding
from xmc_ray.model.casting import cast_together
from xmc_ray.model.lightxml import LightXML
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.model.sharding import Exchange
from xmc_ray.on_ray.tag import job as tag_job
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.train import job as train_job
from xmc_ray.training.checkpoint import Checkpoints, CheckpointsConfig
from xmc_ray.training.fit import epoch_plan, share_of_batches
from xmc_ray.training.loop import TrainState, train

OPTIM = OptimConfig(encoder_lr=0.05, head_lr=0.05, rows_lr=0.04, swa_start=0.3, swa_every=2)
MOST_WAITS, MOST_WAITS_OF_PREDICTION = 4, 2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def h100() -> Iterator[None]:
    mimic.become(H100)
    yield
    mimic.become(H100)


def trained(
    device: torch.device, *, flat: bool = False, steps: int = 4, state: TrainState | None = None, **settings: Any
) -> tuple[TrainState, list[float]]:
    """A toy that has trained for so many steps, and its losses; ``settings`` of the loop, and of the model."""
    loop = {name: settings.pop(name) for name in ("precision", "accumulate") if name in settings}
    config = LoopConfig(epochs=1, batch_size=16, **loop)
    if state is None:
        groups = LabelGroups(np.arange(12)) if flat else None
        model = toy_model(groups, **{"lift": 1.0, **settings})
        model.start_from_counts(np.arange(12) + 1, 100)
        state = TrainState.start(model.to(device), OPTIM)
    table, exchange = documents(), state.model.exchange
    plan = epoch_plan(config, len(table))
    done = train(state, state.model, lambda first: share_of_batches(table, plan, 1, first, exchange), plan.steps, config)
    return state, [step.loss for step in itertools.islice(done, steps)]


def predicted(model: LightXML, scoring: Any = "grouped", precision: Any = "float32") -> tuple[Any, Any]:
    return predict(model, documents()["tokens"].combine_chunks(), 3, PredictConfig(precision=precision), scoring)


# -- the device itself ---------------------------------------------------------------------------------------------------


def test_it_refuses_what_cuda_refuses() -> None:
    here, there = torch.ones(3, device=DEVICE), torch.ones(3)
    for meets in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there[here > 0], lambda: here.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            meets()
    assert (here + torch.tensor(1.0)).tolist() == [2, 2, 2]
    left, right = torch.ones(1024, 8, device=DEVICE).bfloat16(), torch.ones(1024, 8, 8, device=DEVICE).bfloat16()
    ends = torch.arange(1, 1025, dtype=torch.int32).to(DEVICE)
    with pytest.raises(RuntimeError, match="more than 1024 groups"):
        torch.nn.functional.grouped_mm(left, right, offs=ends)


def test_it_counts_waits() -> None:
    def waits(call: Callable[[], object]) -> list[str]:
        with mimic.listening() as log:
            call()
        return [what for _, what in log.waits.elements()]

    here, there = torch.ones(3, device=DEVICE), torch.ones(3)
    assert waits(lambda: here + 1) == []
    assert waits(lambda: here.sum().item()) == ["item"]
    assert "mask" in waits(lambda: here[here > 0])
    assert waits(here.nonzero) == ["nonzero"]
    assert waits(here.unique) == ["_unique2"]
    assert waits(here.tolist) == waits(here.cpu) == ["copy to the host"]
    assert waits(lambda: there.to(DEVICE)) == waits(lambda: there.to(DEVICE, non_blocking=True)) == ["copy to the device"]
    assert waits(lambda: there.pin_memory().to(DEVICE, non_blocking=True)) == []


def test_it_counts_launches_as_cuda_makes_them() -> None:
    """By MultiTensorApply.cuh: at most 110 tensors of one list, 64 of two, and 320 blocks of 65,536 numbers."""
    small = [torch.ones(3, device=DEVICE) for _ in range(200)]
    halves = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in small]
    large = [torch.ones(319 * 65536, device=DEVICE, dtype=torch.bfloat16), torch.ones(65537, device=DEVICE).bfloat16()]
    assert launches_of(lambda: torch._foreach_mul_(small, 2.0)) == 2
    assert launches_of(lambda: torch._foreach_copy_(halves, small)) == 4
    assert halves[7].tolist() == [2, 2, 2]
    assert launches_of(lambda: torch._foreach_mul_(large, 2.0)) == 2
    assert launches_of(lambda: torch._foreach_norm(small)) == 2 + 3  # and two tensors to clear, one kernel that ends the sums
    apart = [torch.ones(2, 3, device=DEVICE) for _ in range(5)]
    assert launches_of(lambda: torch._foreach_copy_([torch.ones(3, 2, device=DEVICE).t() for _ in apart], apart)) >= 5
    with mimic.apart():
        assert launches_of(lambda: torch._foreach_mul_(small, 2.0)) == 200


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_one_launch_and_three_backward(masked: bool, causal: bool) -> None:
    torch.manual_seed(0)
    if masked and causal:
        return
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    inputs += [torch.randn(2, 1, 5, 5)] if masked else []
    found = []
    for device in (CPU, DEVICE):
        here = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
        with mimic.listening() as log:
            out = F.scaled_dot_product_attention(*here, is_causal=causal, scale=0.4)
        assert log.launches.total() == (device == DEVICE)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        with mimic.listening() as log:
            gradients = torch.autograd.grad(out, here, gradient)
        assert log.launches.total() == 3 * (device == DEVICE)
        found.append([out, *gradients])
    for expected, tensor in zip(*found, strict=True):
        torch.testing.assert_close(tensor.cpu(), expected, rtol=1e-4, atol=1e-5)
    dropped = F.scaled_dot_product_attention(*(tensor.to(DEVICE) for tensor in inputs[:3]), dropout_p=0.5)
    assert not torch.equal(dropped, F.scaled_dot_product_attention(*(tensor.to(DEVICE) for tensor in inputs[:3])))


def launches_of(call: Callable[[], object]) -> int:
    with mimic.listening() as log:
        call()
    return log.launches.total()


def test_what_a_layer_of_a_transformer_launches() -> None:
    """Forward: 6 products, 4 casts of inputs, attention, dropout, sum and norm twice, GELU."""
    tokens_BT = torch.randint(50, (4, 6)).to(DEVICE)
    counts = []
    for layers in (2, 3):
        small: Any = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        model = BertModel(BertConfig(num_hidden_layers=layers, **small), add_pooling_layer=False).to(DEVICE).train()
        with torch.autocast("mimic", torch.bfloat16), cast_together(model, torch.bfloat16), mimic.listening() as forward:
            loss = model(tokens_BT).last_hidden_state.square().sum()
        counts.append((forward.launches.total(), launches_of(loss.backward)))
    assert tuple(more - fewer for fewer, more in zip(*counts, strict=True)) == (18, 38)


# -- training and prediction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize("card", [H100, L4])
def test_float32_computes_as_a_cpu_does(flat: bool, lexical: bool, card: tuple[int, int]) -> None:
    mimic.become(card)
    for accumulate, table in ((1, "float32"), (2, "bfloat16")):
        settings = {"flat": flat, "lexical": lexical, "table": table, "accumulate": accumulate, "precision": "float32"}
        (here, losses), (there, expected) = (trained(device, **settings) for device in (DEVICE, CPU))
        assert losses == pytest.approx(expected, rel=1e-3)
        for scoring in ("grouped", "exact"):
            here.averager.keep(here.model)
            there.averager.keep(there.model)
            (score, label), (expected_score, expected_label) = predicted(here.model, scoring), predicted(there.model, scoring)
            np.testing.assert_allclose(score, expected_score, rtol=0.02, atol=0.01)
            assert (label == expected_label).mean() > 0.9


@pytest.mark.parametrize("card", [H100, L4])
def test_bfloat16_stays_close(card: tuple[int, int]) -> None:
    mimic.become(card)
    for flat, accumulate in ((False, 1), (True, 2)):
        settings = {"flat": flat, "lexical": True, "table": "bfloat16", "accumulate": accumulate, "precision": "bfloat16"}
        (here, losses), (_, expected) = (trained(device, **settings) for device in (DEVICE, CPU))
        assert losses == pytest.approx(expected, rel=0.05)
        assert np.isfinite(predicted(here.model, "exact", "bfloat16")[0]).all()


def test_a_card_without_bfloat16_computes_in_float32() -> None:
    mimic.become(T4)
    with pytest.warns(UserWarning, match="no bfloat16"):
        _, losses = trained(DEVICE, precision="bfloat16", steps=1)
    assert losses == pytest.approx(trained(CPU, precision="float32", steps=1)[1], rel=1e-5)


@pytest.mark.parametrize("card", [H100, L4])
def test_more_groups_than_a_call_takes(card: tuple[int, int]) -> None:
    """As many as prediction and a step may use, in bfloat16."""
    mimic.become(card)
    n_groups = 1500
    model = toy_model(LabelGroups(np.arange(2 * n_groups) % n_groups), shortlist=n_groups, table="bfloat16").to(DEVICE)
    with mimic.listening() as log:
        trained(DEVICE, state=TrainState.start(model, OPTIM), steps=1, precision="bfloat16")
        predicted(model, precision="bfloat16")
    assert log.most_groups == (1023 if card == H100 else 0)


# -- waits ---------------------------------------------------------------------------------------------------------------


def bert(tiny_encoder: Path, lexical: bool, **changes: Any) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(name=str(tiny_encoder), feature_layers=2, **changes),
        groups=GroupsConfig(max_size=3),
        model=ModelConfig(shortlist=3, bottleneck=16),
        lexical=LexicalConfig(width=8, columns=512, rarest=1) if lexical else LexicalConfig(),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2, swa_start=0.5, swa_every=2),
        loop=LoopConfig(epochs=2, batch_size=16),
    )


def texts_and_labels() -> tuple[list[str], list[list[str]]]:
    words = ["red", "green", "yellow", "apple", "pear", "plum", "grape", "blue"]
    rows = [[words[n % 3], words[3 + n % 4], *words[7 : 7 + n % 2]] for n in range(48)]
    return [f"a {' '.join(row)}" for row in rows], rows


@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize("card", [H100, L4])
def test_a_step_waits_four_times_and_a_prediction_batch_twice(tiny_encoder: Path, lexical: bool, card: tuple[int, int]) -> None:
    mimic.become(card)
    texts, labels = texts_and_labels()
    check_waits(XMCClassifier.fit(texts, labels, config=bert(tiny_encoder, lexical), device="mimic:0"))


def check_waits(classifier: XMCClassifier) -> None:
    """Trains a classifier for some more steps, and predicts; the first step is not counted, since it settles scales."""
    (texts, labels), bundle = texts_and_labels(), classifier.bundle
    table = pa.table({"tokens": bundle.tokenizer.encode(pa.array(texts))[0], "labels": bundle.labels.encode(pa.array(labels))})
    config, state = LoopConfig(epochs=1, batch_size=16), TrainState.start(bundle.model, OPTIM)
    plan, exchange = epoch_plan(config, len(table)), bundle.model.exchange
    steps = train(state, bundle.model, lambda first: share_of_batches(table, plan, 1, first, exchange), plan.steps, config)
    next(steps)
    for _ in range(2):
        with mimic.listening() as log:
            next(steps)
        assert log.waits.total() <= MOST_WAITS, log.table()
        assert "_foreach_copy_" in {name for _, name in log.launches}  # weights are cast together
    with mimic.listening() as log:
        classifier.predict(texts, k=2)
    assert log.waits.total() <= MOST_WAITS_OF_PREDICTION, log.table()


# -- everything else -----------------------------------------------------------------------------------------------------


def test_checkpoints_resume_where_they_were(tmp_path: Path) -> None:
    config = CheckpointsConfig(steps=1, keep_last=2)
    settings = {"lexical": True, "dropout": 0.2, "table": "bfloat16", "precision": "bfloat16"}
    ended, losses = trained(DEVICE, **settings)
    half, _ = trained(DEVICE, steps=2, **settings)
    checkpoints = Checkpoints(str(tmp_path), config, {"labels": "abc"})
    checkpoints.save(half)
    checkpoints.wait()
    for device in (DEVICE, CPU):
        model = toy_model(seed=1, lexical=True, dropout=0.2, table="bfloat16", lift=1.0).to(device)
        resumed = TrainState.start(model, OPTIM)
        Checkpoints(str(tmp_path), config, {"labels": "abc"}).resume(resumed, lambda line: None)
        _, rest = trained(device, state=resumed, steps=2, precision="bfloat16")
        if device == DEVICE:
            assert rest == losses[2:]
            for name, tensor in ended.model.state_dict().items():
                assert torch.equal(tensor.cpu(), resumed.model.state_dict()[name].cpu()), name


def test_the_classifier_does_all_that_it_can(tiny_encoder: Path, tmp_path: Path) -> None:
    """Fit with averaging and a linear ranker, calibrate, save, load, an ensemble, explain, extend."""
    texts, labels = texts_and_labels()
    for place, config in (("words", bert(tiny_encoder, True, layers=0)), ("both", bert(tiny_encoder, True, pooling="mean"))):
        if place == "words":
            config = FitConfig(**{**vars(config), "linear": LinearConfig(candidates=4)})
        classifier = XMCClassifier.fit(texts, labels, config=config, device="mimic:0")
        classifier.calibrate(texts, labels)
        assert classifier.evaluate(texts, labels)["documents"] == len(texts)
        classifier.save(str(tmp_path / place))
        for device in ("mimic:0", "cpu"):
            again = XMCClassifier.load(str(tmp_path / place), device=device).predict(texts[:5], k=2)
            if device == "mimic:0":
                assert again == classifier.predict(texts[:5], k=2)
        assert str(classifier.explain(texts[0], "red"))
        extended = classifier.extend([*texts[:6], "a blue grape"], [*labels[:6], ["new"]])
        assert "new" in {label for tags in extended.predict(["a blue grape"], k=9) for label, _ in tags}
    ensemble = XMCClassifier.load([str(tmp_path / "words"), str(tmp_path / "both")], device="mimic:0")
    assert len(ensemble.predict(texts, k=3)) == len(texts)


# -- several workers -----------------------------------------------------------------------------------------------------


class Mirrored:
    """Stands for torch.distributed in a group of two, whose other worker has the same tensors; takes what NCCL takes."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _take(self, name: str, *tensors: Tensor) -> None:
        self.calls.append(name)
        for tensor in tensors:
            assert tensor.device == DEVICE, f"{name}: a tensor on {tensor.device}"
            assert tensor.is_contiguous(), f"{name}: not contiguous"
            assert tensor.dtype in (torch.int64, torch.float64, torch.float32, torch.bfloat16), f"{name}: {tensor.dtype}"

    def all_gather_single(self, gathered: Tensor, tensor: Tensor) -> None:
        self._take("gather", gathered, tensor)
        gathered.copy_(torch.cat([tensor, tensor]))

    def reduce_scatter_single(self, total: Tensor, tensor: Tensor) -> None:
        self._take("scatter", total, tensor)
        total.copy_(2 * tensor[: len(total)])
        self.summed = total.dtype

    def all_reduce(self, tensor: Tensor) -> None:
        self._take("sum", tensor)
        tensor.mul_(2)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self._take("broadcast", tensor)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_workers_exchange_lies_on_the_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Mirrored()
    monkeypatch.setattr(sharding, "dist", group)
    model = toy_model(exchange=Exchange(0, 2), lexical=True).to(DEVICE)
    trained(DEVICE, state=TrainState.start(model, OPTIM), precision=precision, accumulate=2)
    predicted(model, "exact", precision)
    assert {*group.calls} == {"gather", "scatter", "sum"}
    assert group.summed == torch.float32


def test_such_a_group_refuses_tensors_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "dist", Mirrored())
    with pytest.raises(AssertionError, match="a tensor on cpu"):
        Exchange(0, 2).sum(torch.zeros(1))


# -- the jobs on Ray -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_training_and_a_night_on_ray(fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wires Ray to a GPU: a worker, the driver that calibrates, and an actor, each with the device where that would be."""
    mimic_jobs.name_it(monkeypatch)
    monkeypatch.setattr(train_job, "work", mimic_jobs.work)
    monkeypatch.setattr(tag_job, "load_predictor", mimic_jobs.load)
    settings = options(fruit, tiny_encoder, tmp_path / "run", "--loop.precision=bfloat16")
    bundle = train_job.run(command.parse(train_job.TrainConfig, settings))
    metrics = json.loads(Path(bundle, "metrics.json").read_text())
    assert metrics["calibration"]["arithmetic"] == "mimic bfloat16" and metrics["P@1"] > 0.8
    night = [f"--documents.uri={fruit}/test.parquet", f"--bundle={bundle}", f"--output={tmp_path}/tags", "--k=3"]
    night += ["--model.precision=bfloat16", "--pool.max=1", "--pool.threads=1"]
    folder = tag_job.tag(command.parse(TagConfig, night))
    manifest, tags = manifest_of(folder), read_night(folder)[0].sort_by("id")
    assert (manifest["tagged"], manifest["arithmetic"]) == (48, "mimic bfloat16")
    documents = pq.read_table(fruit / "test.parquet").sort_by("id")
    expected = XMCClassifier.load(bundle, device="mimic:0").predict(documents["text"].to_pylist(), k=3)
    assert [set(labels) for labels in tags["labels"].to_pylist()] == [{label for label, _ in row} for row in expected]


# -- mutants -------------------------------------------------------------------------------------------------------------

ELSEWHERE = "same device|two devices"


def waits(module: str, what: str) -> str:
    """What the table of waits says of one."""
    return rf"model/{module}\.py:\d+ +wait: {what}"


MUTANTS = [  # where, what is replaced, by what, and what is said of it
    (recall.RecallHead.loss, "upload(true_2P, features_BF.device)", "true_2P", ELSEWHERE),
    (
        recall.RecallHead.loss,
        "self.best(logits_Bg, shortlist)[1]",
        "self.best(logits_Bg.cpu(), shortlist)[1].to(logits_Bg.device)",
        waits("lightxml", "copy to the host"),
    ),
    (recall.RecallHead.loss, "features_BF.detach().float()", "features_BF.detach().float().cpu()", ELSEWHERE),
    (ranking.LabelTable._loss, "torch.zeros_like(vectors_BH, dtype=torch.float32)", "torch.zeros(vectors_BH.shape)", ELSEWHERE),
    (ranking.LabelTable._loss, "(logits_NM).mul_(valid_NM).sum()", "(logits_NM)[valid_NM].sum()", waits("ranking", "mask")),
    (ranking.LabelTable._loss, "pairs.layout(vectors_BH.device,", "pairs.layout(torch.device('cpu'),", ELSEWHERE),
    (ranking.LabelTable.valid, ", device=group.device", "", ELSEWHERE),
    (ranking.LabelTable.predict, "upload(place_BK, vectors_BH.device)", "place_BK", waits("lightxml", "indices on the host")),
    (ranking.LabelTable.predict, "upload(pairs.group_n, vectors_BH.device)", "pairs.group_n", ELSEWHERE),
    (ranking.LabelTable.gradients, "part_NM.new_zeros(", "torch.zeros(", ELSEWHERE),
    (ranking.LabelTable._scores, ".float() + self", ".float().cpu() + self", ELSEWHERE),
    (pairs.Padded.product, "left_NA.new_empty", "torch.empty", ELSEWHERE),
    (pairs.Padded.spread, "upload(value_N, self.device)", "value_N", ELSEWHERE),
    (LightXML.features, "upload(batch.mask_BT, device)", "batch.mask_BT", waits("device", "copy to the device")),
    (LightXML.features, "KnownMask(batch.mask_BT)", "nullcontext()", waits("encoder", "item")),
    (LightXML._gathered, "features_bF.to(dtype)", "features_bF.to(dtype).cpu()", "must have the same dtype, but got Float"),
    (sharding.with_gradient, "gradient.to(inputs.dtype)", "gradient.to(inputs.dtype).cpu()", ELSEWHERE),
    (sharding.rounded, "torch.randint_like(bits, 1 << 16)", "torch.randint(1 << 16, bits.shape)", ELSEWHERE),
]


@pytest.fixture(scope="module")
def classifier(tiny_encoder: Path) -> XMCClassifier:
    return XMCClassifier.fit(*texts_and_labels(), config=bert(tiny_encoder, True), device="mimic:0")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0].__qualname__}: {mutant[2]}")
def test_a_planted_fault_is_caught(mutant: Any, classifier: XMCClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    function, original, fault, reason = mutant
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(original) == 1
    namespace = dict(function.__globals__)
    exec(source.replace(original, fault), namespace)
    monkeypatch.setattr(function, "__code__", namespace[function.__name__].__code__)
    mimic.become(L4)
    with pytest.raises((RuntimeError, AssertionError), match=reason):
        check_waits(classifier)


def test_without_a_fault_nothing_is_caught(classifier: XMCClassifier) -> None:
    mimic.become(L4)
    check_waits(classifier)

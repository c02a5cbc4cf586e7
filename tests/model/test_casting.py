"""Fewer casts: the same bits as by autocast alone, forward and backward, by far fewer kernels."""

import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from xmc_ray.model import casting
from xmc_ray.model.casting import cast_together
from xmc_ray.model.encoder import TextEncoder


def bert(layers: int, frozen: int = 0, dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    small: Any = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    rates: Any = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model: Any = BertModel(BertConfig(num_hidden_layers=layers, **small, **rates), add_pooling_layer=False)
    model.get_input_embeddings().sparse = True
    for part in (model.embeddings, *model.encoder.layer)[: frozen and frozen + 1]:
        part.requires_grad_(False)
    return model


def states_and_gradients(model: nn.Module, tokens_BT: Tensor, fewer: bool, steps: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states and the gradients, which add up over the steps."""
    model.zero_grad()
    for step in range(steps):
        torch.manual_seed(step)  # dropout
        with torch.autocast("cpu", torch.bfloat16), cast_together(model, torch.bfloat16) if fewer else nullcontext():
            state_BTH = model(tokens_BT).last_hidden_state
        (state_BTH * torch.linspace(-1, 1, 16)).square().sum().backward()
    gradients = {name: part.grad.to_dense() for name, part in model.named_parameters() if part.grad is not None}
    return state_BTH.detach(), gradients


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 3),
    frozen=st.integers(0, 2),
    together=st.sampled_from([1, 300, 1000, 1 << 24]),
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
)
def test_the_bits_are_those_of_autocast(layers: int, frozen: int, together: int, seed: int, shape: tuple[int, int]) -> None:
    model = bert(layers, min(frozen, layers - 1))
    tokens_BT = torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))
    expected_BTH, expected = states_and_gradients(model, tokens_BT, fewer=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casting, "_TOGETHER", together)
        state_BTH, gradients = states_and_gradients(model, tokens_BT, fewer=True)
    assert torch.equal(state_BTH, expected_BTH)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"deberta"}))  # which fails within autocast, however weights are cast
def test_the_bits_are_those_of_autocast_in_every_family(kind: str) -> None:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **FAMILIES[kind][0])
    encoder = TextEncoder(AutoModel.from_config(settings).eval(), 2, "mean")
    tokens_BT, mask_BT = torch.randint(5, VOCABULARY, (3, 16)), torch.arange(16) < torch.tensor([[16], [9], [1]])
    found = []
    for casts in (nullcontext(), cast_together(encoder, torch.bfloat16)):
        encoder.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16), casts:
            features_BF = encoder(tokens_BT, mask_BT)
        features_BF.square().sum().backward()
        gradients = {name: part.grad for name, part in encoder.named_parameters() if part.grad is not None}
        found.append({"features": features_BF.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    assert [name for name, expected in found[0].items() if not torch.equal(expected, found[1][name])] == []


def test_prediction_has_the_same_bits() -> None:
    model, tokens_BT = bert(2).eval(), torch.randint(50, (3, 5))
    found = []
    for casts in (nullcontext(), cast_together(model, torch.bfloat16)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), casts:
            found.append([model(tokens_BT).last_hidden_state for _ in range(2)][1])
    assert {part.dtype for part in model.parameters()} == {torch.float32}
    assert torch.equal(*found)


class Casts(TorchDispatchMode):
    """Counts operations, one for a whole list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_together() -> None:
    """Forward a layer keeps 4 of 16 casts: of the inputs of queries, keys, values and the intermediate layer."""
    model, tokens_BT = bert(3, dropout=0.0), torch.randint(50, (2, 4))
    counts = []
    for casts in (nullcontext(), cast_together(model, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16), Casts() as heard, casts:
            model(tokens_BT)
        counts.append((heard.count["_to_copy"], heard.count["_foreach_copy_"]))
    assert counts[0][0] - counts[1][0] == 3 * 12
    assert [together for _, together in counts] == [0, 1]


class Odd(nn.Module):
    """A weight that two layers share, a layer that is not used, one without biases, one first used without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.second.weight = self.first.weight
        self.third = nn.Linear(8, 8, bias=False)

    def forward(self, wide_BH: Tensor) -> Tensor:
        with torch.no_grad():
            hidden_BH = self.first(wide_BH)
        return self.second(wide_BH) + self.first(wide_BH).mul(hidden_BH) + self.third(hidden_BH)


def test_odd_uses_of_weights() -> None:
    torch.manual_seed(0)
    model, wide_BH, found = Odd(), torch.randn(4, 8).requires_grad_(), []
    for casts in (nullcontext(), cast_together(model, torch.bfloat16)):
        model.zero_grad()
        wide_BH.grad = None
        with torch.autocast("cpu", torch.bfloat16), casts:
            result_BH = model(wide_BH)
        result_BH.square().sum().backward()
        assert model.unused.weight.grad is None and wide_BH.grad is not None
        used = (*model.first.parameters(), model.second.bias, model.third.weight)
        found.append([result_BH.detach(), wide_BH.grad, *(part.grad for part in used)])
    for expected, tensor in zip(*found, strict=True):
        assert tensor is not None and torch.equal(expected, tensor)


def test_gradients_reach_data_parallel_training(tmp_path: Path) -> None:
    """Its hooks are on the float32 parameters, several groups of which are cast."""
    model, tokens_BT, found = bert(2, dropout=0.0), torch.randint(50, (2, 4)), []
    model.get_input_embeddings().sparse = False
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(casting, "_TOGETHER", 1000)
            for casts in (nullcontext(), cast_together(model, torch.bfloat16)):
                parallel.zero_grad()
                with torch.autocast("cpu", torch.bfloat16), casts:
                    state_BTH = parallel(tokens_BT).last_hidden_state
                state_BTH.square().sum().backward()
                found.append([part.grad.clone() for part in model.parameters()])
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(expected, gradient) for expected, gradient in zip(*found, strict=True))


def test_the_model_has_its_weights_back_after_an_error() -> None:
    model = bert(1)
    before = dict(model.named_parameters())
    with pytest.raises(IndexError), torch.autocast("cpu", torch.bfloat16), cast_together(model, torch.bfloat16):
        model(torch.tensor([[99]]))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_threads_that_cast_one_model_take_turns() -> None:
    """Kind: what one has put aside is not what the other puts back."""
    model = bert(1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first_in, second_asks = threading.Event(), threading.Event()

    def first() -> None:
        with torch.autocast("cpu", torch.bfloat16), cast_together(model, torch.bfloat16):
            first_in.set()
            second_asks.wait(60)
            with cast_together(model, torch.bfloat16):  # its own thread may, within
                pass

    def second() -> None:
        first_in.wait(60)
        threading.Timer(0.2, second_asks.set).start()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), cast_together(model, torch.bfloat16):
            assert not first_thread.is_alive() or second_asks.is_set()

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    for thread in (first_thread, second_thread):
        thread.start()
    for thread in (first_thread, second_thread):
        thread.join(60)
    assert all(isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())

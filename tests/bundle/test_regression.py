"""Rows from documents and from names are where the losses of the slow twins are least."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from xmc_ray.bundle import regression
from xmc_ray.bundle.regression import Known, RowsConfig, Shortlisted, from_documents, from_names, new_rows
from xmc_ray.errors import DataError

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw: Any) -> tuple[Tensor, Tensor, Tensor, int, RowsConfig]:
    """Documents of which some, none or all have an output, and of which some are used as its negatives."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_rows, width = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    x_DF = torch.from_numpy(rng.normal(size=(n_rows, width)).astype(np.float32))
    y_DN = torch.from_numpy((rng.random((n_rows, 3)) < [0.3, 0.6, 1]).astype(np.float32))
    y_DN[0] = 1
    used_DN = torch.from_numpy(rng.random((n_rows, 3)) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    return x_DF, y_DN, used_DN, draw(st.integers(1, 100)), RowsConfig(penalty=draw(st.sampled_from([0.3, 2.0])))


@QUICK
@given(problems())
def test_rows_from_documents_minimise_the_slow_twin(problem: tuple[Tensor, Tensor, Tensor, int, RowsConfig]) -> None:
    x_DF, y_DN, used_DN, population, config = problem
    weight_NF, bias_N = from_documents(x_DF, y_DN, used_DN, population, config)
    for place in range(3):
        row_F, bias = (part[place].double().requires_grad_() for part in (weight_NF, bias_N))
        truth = y_DN[:, place].int().tolist(), used_DN[:, place].tolist()
        loss = reference.regression_loss(x_DF.double(), *truth, population, config.penalty, row_F, bias)
        for gradient in torch.autograd.grad(loss, [row_F, bias]):
            assert gradient.abs().max() < 1e-2 * (1 + population / len(x_DF))


@QUICK
@given(problems(), st.integers(0, 1000))
def test_rows_from_names_minimise_the_slow_twin(problem: tuple[Tensor, Tensor, Tensor, int, RowsConfig], seed: int) -> None:
    name_EF, config = problem[0], problem[-1]
    n_known, width = name_EF.shape
    generator = torch.Generator().manual_seed(seed)
    known = Known(name_EF, *(torch.randn(*shape, generator=generator) for shape in ((n_known, width), (n_known,))))
    weight_NF, bias_N = from_names(torch.cat([torch.zeros(1, width), torch.eye(width)]), known, config)
    rows_NI = torch.cat([weight_NF, bias_N[:, None]], dim=1).double()
    map_II = torch.cat([rows_NI[1:] - rows_NI[:1], rows_NI[:1]]).requires_grad_()  # the rows of no feature, and of each
    rows_EI = torch.cat([known.weight_EF, known.bias_E[:, None]], dim=1).double()
    loss = reference.name_loss(name_EF.double(), rows_EI, config.penalty, map_II)
    (gradient,) = torch.autograd.grad(loss, [map_II])
    assert gradient.abs().max() < 1e-3


def test_a_deprecated_output_teaches_nothing() -> None:
    torch.manual_seed(0)
    names, rows, biases = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5)
    biases[2] = -torch.inf
    kept = torch.tensor([0, 1, 3, 4])
    query, config = torch.randn(2, 3), RowsConfig()
    for one, other in zip(
        from_names(query, Known(names, rows, biases), config),
        from_names(query, Known(names[kept], rows[kept], biases[kept]), config),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_chunks_change_nothing_and_outputs_without_documents_come_from_names(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x_DF, y_DN = torch.randn(9, 3), (torch.rand(9, 4) < 0.5).float()
    y_DN[:, 1] = 0
    known, names = Known(torch.randn(5, 3), torch.randn(5, 3), torch.randn(5)), torch.randn(4, 3)
    pairs = Shortlisted(torch.randint(0, 3, (9, 2)), torch.tensor([0, 1, 2, 0]))
    arguments = x_DF, sparse.csc_array(y_DN.numpy()), pairs, names, known, 20, RowsConfig(steps=300)
    weight_NF, bias_N = new_rows(*arguments)
    monkeypatch.setattr(regression, "_CELLS", 1)
    for one, other in zip((weight_NF, bias_N), new_rows(*arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    for part, expected in zip((weight_NF, bias_N), from_names(names, known, RowsConfig()), strict=True):
        torch.testing.assert_close(part[1], expected[1])
    used_DN = pairs.of(np.arange(4))
    assert used_DN.tolist() == [[group in row for group in (0, 1, 2, 0)] for row in pairs.shortlist_DK.tolist()]


def test_where_all_labels_are_deprecated_no_name_teaches_anything() -> None:
    known = Known(torch.ones(2, 3), torch.ones(2, 3), torch.full((2,), -torch.inf))
    with pytest.raises(DataError, match="no label in use to learn from how a name becomes a label"):
        from_names(torch.ones(1, 3), known, RowsConfig())

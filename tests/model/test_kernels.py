"""The compiled loops do what they say in Python, and an import of the model does not wait for their compiler."""

import subprocess
import sys
from unittest import mock

import numpy as np
from scipy import sparse

from xmc_ray.model import kernels


def test_compiled_loops_compute_what_python_does() -> None:
    rng = np.random.default_rng(3)
    x_DF = sparse.random_array((30, 40), density=0.2, rng=rng, dtype=np.float32, format="csr")
    kind_LD = sparse.csr_array(rng.choice(np.array([0, 1, 2, 3, 7], np.int8), (9, 30)))
    terms = x_DF.indptr.astype(np.int64), x_DF.indices.astype(np.int32), x_DF.data
    pairs = kind_LD.indptr.astype(np.int64), kind_LD.indices.astype(np.int32), kind_LD.data
    problem = *terms, 1 + np.asarray(x_DF.power(2).sum(1), np.float64), *pairs, 0, 40, 1.0, 5.0, 0.05, 20, 0.1
    weights = kernels.solve(*problem)
    with np.errstate(over="ignore"):  # of the generator's state, as it should
        in_python = kernels.solve.py_func(*problem)
    for compiled, plain in zip(weights, in_python, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    with np.errstate(over="ignore"), mock.patch.object(kernels, "MOST_COPIED", 0):  # examples are read where they are
        in_place = kernels.solve.py_func(*problem)
    assert all(np.array_equal(copied, read) for copied, read in zip(in_python, in_place, strict=True))
    size_L, column_W, weight_W, bias_L = weights
    assert size_L.sum() == len(column_W) > 0
    label_BC = rng.integers(0, 9, (30, 4))
    of_labels = np.concatenate([[0], np.cumsum(size_L)]), column_W, weight_W, bias_L
    compiled_BC, plain_BC = np.zeros((2, *label_BC.shape), np.float32)
    columns = terms[1].astype(np.int64)
    kernels.margins(terms[0], columns, terms[2], label_BC, *of_labels, 40, compiled_BC)
    kernels.margins.py_func(terms[0], columns, terms[2], label_BC, *of_labels, 40, plain_BC)
    np.testing.assert_allclose(compiled_BC, plain_BC, rtol=1e-5)
    assert compiled_BC.std() > 0


def test_what_a_model_may_not_need_is_not_imported_with_it() -> None:
    """numba and transformers cost every process of a job a second or two."""
    modules = "xmc_ray.on_ray.train.worker", "xmc_ray.on_ray.predictor", "xmc_ray.on_ray.train.job"
    script = f"import sys, {', '.join(modules)}; print([*{{'numba', 'transformers'}} & {{*sys.modules}}])"
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert imported.stdout == "[]\n", imported.stdout

"""The loops of the linear ranker, compiled by numba when they are first called: a second or two in each process.

They release Python's lock, so that threads run them side by side. `model.linear` and `model.svm` import them when they need
them.

Letters: B documents of a batch, C candidates, D documents, E examples, F columns, L labels, N distinct (document, term) pairs,
W non-zero weights; of one label's examples, A terms and G columns.
"""

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

MOST_COPIED = 1 << 24  # terms of the examples of a label, 12 bytes each in every thread


@numba.njit(nogil=True)
def margins(
    start_B1: Longs,
    column_N: Longs,
    weight_N: Floats,
    label_BC: Longs,
    start_L1: Longs,
    column_W: Ints,
    weight_W: Floats,
    bias_L: Floats,
    n_columns: int,
    z_BC: Floats,
) -> None:
    """Write z of every candidate; a document's terms lie in a dense row while its candidates are scored."""
    x_F = np.zeros(n_columns, np.float32)
    for row in range(len(label_BC)):
        for term in range(start_B1[row], start_B1[row + 1]):
            x_F[column_N[term]] = weight_N[term]
        for place in range(label_BC.shape[1]):
            label = label_BC[row, place]
            z = bias_L[label]
            for part in range(start_L1[label], start_L1[label + 1]):
                z += weight_W[part] * x_F[column_W[part]]
            z_BC[row, place] = z
        for term in range(start_B1[row], start_B1[row + 1]):
            x_F[column_N[term]] = 0


@numba.njit(nogil=True)
def solve(
    start_D1: Longs,
    column_N: Ints,
    x_N: Floats,
    square_D: npt.NDArray[np.float64],
    start_L1: Longs,
    document_E: Ints,
    kind_E: npt.NDArray[np.int8],
    first_label: int,
    n_columns: int,
    cost: float,
    judged_weight: float,
    smallest: float,
    passes: int,
    tolerance: float,
) -> tuple[Longs, Ints, Floats, Floats]:
    """`svm.Weights` of labels. A label's examples are copied first: its passes read little memory, one row after the other.

    Those of a label with more than `MOST_COPIED` terms are read where they are.
    """
    n_labels = len(start_L1) - 1
    size_L, bias_L = np.zeros(n_labels, np.int64), np.ones(n_labels, np.float32)
    column_W, weight_W, filled = np.empty(1024, np.int32), np.empty(1024, np.float32), 0
    every_F = np.arange(n_columns, dtype=np.int32)
    place_F, plain_diagonal, judged_diagonal = np.full(n_columns, -1, np.int32), 0.5 / cost, 0.5 / (cost * judged_weight)
    for label in range(n_labels):
        documents, kinds = document_E[start_L1[label] : start_L1[label + 1]], kind_E[start_L1[label] : start_L1[label + 1]]
        if not np.any(kinds & 2):
            continue
        n = len(documents)
        start_E, end_E, square_E = start_D1[documents], start_D1[documents + 1], square_D[documents]
        place_A, x_A, column_G, n_places = column_N, x_N, every_F, n_columns
        n_terms = np.sum(end_E - start_E)
        if n_terms <= MOST_COPIED:
            place_A, x_A = np.empty(n_terms, np.int32), np.empty(n_terms, np.float32)
            column_G, n_places, filled_A = np.empty(n_terms, np.int32), 0, 0
            for example in range(n):
                first, start_E[example] = start_E[example], filled_A
                for term in range(first, end_E[example]):
                    column = column_N[term]
                    if place_F[column] < 0:
                        place_F[column], column_G[n_places] = n_places, column
                        n_places += 1
                    place_A[filled_A], x_A[filled_A] = place_F[column], x_N[term]
                    filled_A += 1
                end_E[example] = filled_A
            for place in range(n_places):
                place_F[column_G[place]] = -1
        w_G, alpha, order, bias, active = np.zeros(n_places), np.zeros(n), np.arange(n), 0.0, n
        highest, state = np.inf, np.uint64(first_label + label)
        for _ in range(passes):
            largest, least = -np.inf, np.inf
            for place in range(active):  # shuffle
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                other = place + np.int64((state >> np.uint64(33)) % np.uint64(active - place))
                order[place], order[other] = order[other], order[place]
            place = 0
            while place < active:
                example = order[place]
                y = 1.0 if kinds[example] & 2 else -1.0
                diagonal = judged_diagonal if kinds[example] & 4 else plain_diagonal
                z = bias
                for term in range(start_E[example], end_E[example]):
                    z += w_G[place_A[term]] * x_A[term]
                slope = y * z - 1 + alpha[example] * diagonal
                if alpha[example] == 0 and slope > highest:  # it will hardly count again: leave it out for now
                    active -= 1
                    order[place], order[active] = order[active], order[place]
                    continue
                projected = slope if alpha[example] > 0 else min(slope, 0.0)
                largest, least = max(largest, projected), min(least, projected)
                if abs(projected) > 1e-12:
                    before = alpha[example]
                    alpha[example] = max(before - slope / (square_E[example] + diagonal), 0.0)
                    step = (alpha[example] - before) * y
                    bias += step
                    for term in range(start_E[example], end_E[example]):
                        w_G[place_A[term]] += step * x_A[term]
                place += 1
            if largest - least <= tolerance:
                if active == n:
                    break
                active, highest = n, np.inf  # once more with those left out
            else:
                highest = largest if largest > 0 else np.inf
        bias_L[label] = bias
        for example in range(n):
            if alpha[example] == 0:  # rounding leaves crumbs of those that no longer count
                continue
            for term in range(start_E[example], end_E[example]):
                place = place_A[term]
                if abs(w_G[place]) >= smallest and w_G[place] != 0:
                    if filled == len(column_W):
                        column_W = np.concatenate((column_W, np.empty_like(column_W)))
                        weight_W = np.concatenate((weight_W, np.empty_like(weight_W)))
                    column_W[filled], weight_W[filled] = column_G[place], w_G[place]
                    filled += 1
                    size_L[label] += 1
                w_G[place] = 0  # it is written once
    return size_L, column_W[:filled].copy(), weight_W[:filled].copy(), bias_L

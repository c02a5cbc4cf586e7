"""Judged pairs: which groups are judged, and what a pair counts. The losses are compared in test_lightxml."""

import pytest
import torch
from toys import pairs_of

from xmc_ray.model.judged import Judged


def test_a_group_is_judged_as_its_labels_are() -> None:
    """Labels 0 and 1 are in group 0, 2 and 3 in group 1, 4 in group 2."""
    truth, judged = [[0], [1, 3], [2]], [[1], [0, 2, 3, 4], []]
    row_P, label_P = pairs_of(truth)
    labels = Judged.of_labels(*pairs_of(judged), row_P, label_P, 5, 3.0)
    assert labels.true_J.tolist() == [False, False, False, True, False]
    group_L = torch.tensor([0, 0, 1, 1, 2])
    groups = labels.of_groups(group_L, row_P, group_L[label_P], 3)
    # In the first document label 0 is true beside the rejected 1, in the second 1 beside 0: group 0 is not judged.
    found = zip(groups.row_J.tolist(), groups.output_J.tolist(), groups.true_J.tolist(), strict=True)
    assert {*found} == {(1, 1, True), (1, 2, False)} and len(groups.row_J) == 2
    kept = groups.where(groups.true_J)
    assert (kept.row_J.tolist(), kept.output_J.tolist(), kept.weight) == ([1], [1], 3.0)


@pytest.mark.parametrize("weight", [1.0, 0.25, 8.0])
def test_the_excess_is_what_a_pair_counts_beyond_one(weight: float) -> None:
    logit_J = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    true_J = torch.tensor([True, False] * 3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_J, true_J.float(), reduction="sum")
    (slope_J,) = torch.autograd.grad(loss, logit_J)
    nothing = torch.zeros(6, dtype=torch.long)
    excess, extra_J = Judged(nothing, nothing, true_J, weight).excess(logit_J.detach())
    torch.testing.assert_close(excess, (weight - 1) * loss.detach())
    torch.testing.assert_close(extra_J, (weight - 1) * slope_J)

"""Which documents are held out."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from xmc_ray.data.split import METRICS, ValidationConfig, draws, held_out_use, uses
from xmc_ray.metrics.at_k import Metrics


def test_blank_series_are_none_and_need_words() -> None:
    """Names are hashed without the space around them; where none is left, the words are, if there are any."""
    texts = pa.array(["a b", "a b", "c", "!!!", "!!!", "A, b!"])
    series = pa.array(["one", " one ", "one", "one", " ", None])
    for share in np.linspace(0.05, 0.95, 19):
        validation = ValidationConfig(share=float(share))
        dealt = held_out_use(texts, series, validation).tolist()
        assert dealt[:4] == dealt[:1] * 4 and dealt[4] == 0
        assert dealt[5] == held_out_use(texts, pa.nulls(6, pa.string()), validation)[0]


def test_a_larger_share_holds_out_the_same_documents_and_more() -> None:
    """So a share can be chosen after the documents were read."""
    draw_D = draws(pa.array([f"text {number}" for number in range(2_000)]), pa.nulls(2_000, pa.string()))
    held_out = np.array([uses(draw_D, ValidationConfig(share=share)) for share in (0.0, 0.01, 0.2, 0.5)])
    shares = (held_out > 0).mean(1)
    np.testing.assert_allclose(shares, [0, 0.01, 0.2, 0.5], atol=0.03)
    for fewer, more in pairwise(held_out):
        assert (more[fewer > 0] == fewer[fewer > 0]).all()
    assert 0.4 < (held_out[-1] == 2).sum() / (held_out[-1] > 0).sum() < 0.6


def test_the_best_checkpoint_may_be_chosen_by_every_metric_that_there_is() -> None:
    assert [name for name in Metrics(np.ones(1, np.int64), 1).result()["total"] if "@" in name] == METRICS

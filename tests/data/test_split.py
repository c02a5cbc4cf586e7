"""Which documents are held out."""

import numpy as np
import pyarrow as pa

from xmc_ray.data.split import METRICS, ValidationConfig, held_out_use
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


def test_the_best_checkpoint_may_be_chosen_by_every_metric_that_there_is() -> None:
    assert [name for name in Metrics(np.ones(1, np.int64), 1).result()["total"] if "@" in name] == METRICS

"""Tables with predictions: what a writer finds in them."""

import numpy as np
import pyarrow as pa

from xmc_ray import __version__
from xmc_ray.on_ray.predicted import made_by, made_by_of, matrix, with_predictions


def test_a_table_comes_out_with_its_predictions_and_says_what_made_them() -> None:
    ids, scores = np.array([[4, 2], [7, -1]]), np.array([[0.75, 0.5], [0.25, 0]], np.float32)
    computed = made_by(["cuda bfloat16", "cpu float32", "cuda bfloat16"])
    assert computed == {"release": __version__, "arithmetic": "cpu float32, cuda bfloat16"}
    table = pa.table({"id": ["a", "b"]})
    predicted = with_predictions(table, ids, scores, computed)
    assert predicted.column_names == ["id", "ids", "probabilities"]
    np.testing.assert_array_equal(matrix(predicted, "ids"), ids)
    np.testing.assert_array_equal(matrix(predicted, "probabilities"), scores)
    assert made_by_of(predicted) == computed and made_by_of(table) == {}
    for rows in (0, 1):  # slices, as Ray hands them on, and none at all
        part = predicted.slice(1, rows)
        assert matrix(part, "ids").tolist() == [[7, -1]][:rows] and made_by_of(part) == computed

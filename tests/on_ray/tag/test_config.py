"""The settings of a night: what does not go together, and what changes nothing that it produces."""

import pytest

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.rerank import RerankConfig
from xmc_ray.settings import fixed_settings

NIGHT = {"documents": DocumentsConfig(uri="x"), "bundle": "y", "output": "z"}
HOOK = RerankConfig(function="a_module:a_function", version="1", candidates=30)


def test_a_hook_is_shown_more_labels_than_a_document_gets() -> None:
    assert TagConfig(**NIGHT, k=3).n_listed == 3
    assert TagConfig(**NIGHT, k=3, rerank=HOOK).n_listed == 30
    with pytest.raises(ConfigError, match="candidates"):
        TagConfig(**NIGHT, k=31, rerank=HOOK)


def test_where_and_how_fast_may_change_and_what_comes_out_may_not() -> None:
    fixed = fixed_settings(TagConfig(**NIGHT))
    assert {"documents", "bundle", "k", "min_score", "min_precision", "filters", "hierarchy", "model", "rerank"} <= set(fixed)
    assert not {"output", "date", "pool", "commit_rows", "gate", "drift", "table", "keep"} & set(fixed)

"""What a hierarchy does to tags, against plain loops over documents and labels."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hierarchies import LABELS, Tag, above, closed, hierarchies, level, limited, narrowest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray.data.hierarchy import Hierarchy
from xmc_ray.data.tag_hierarchy import HierarchyConfig, TagHierarchy
from xmc_ray.errors import ConfigError, DataError

THOROUGH = settings(max_examples=300, deadline=None, derandomize=True)
KNOWN = LABELS[:6]  # the bundle's; some of them are in no hierarchy, and some of a hierarchy's are not among them


def bound(parents: dict[str, list[str]], labels: list[str] = KNOWN, names: Any = None, **settings: Any) -> TagHierarchy:
    rows = pa.table({"label": list(parents), "parent": pa.array(parents.values(), pa.list_(pa.string()))})
    given_names = pa.array(names or [None] * len(labels), pa.string())
    index = pa.table({"label": labels, "name": given_names, "count": np.arange(len(labels))})
    return TagHierarchy(Hierarchy.from_table(rows), index, HierarchyConfig(table="h.parquet", **settings))


def tags_of(hierarchy: TagHierarchy, documents: list[list[Tag]]) -> list[list[Tag]]:
    labels = hierarchy.labels["label"].to_pylist()
    rows = np.repeat(np.arange(len(documents)), [len(tags) for tags in documents])
    pairs = [tag for tags in documents for tag in tags]
    ids = np.array([labels.index(label) for label, _ in pairs], np.int64)
    tags = hierarchy(rows, ids, np.array([score for _, score in pairs], np.float32))
    assert tags.score_T.dtype == np.float32 and (np.diff(tags.row_T) >= 0).all()
    named = [(labels[label], round(float(score), 4)) for label, score in zip(tags.label_T, tags.score_T, strict=True)]
    return [[tag for tag, row in zip(named, tags.row_T, strict=True) if row == number] for number in range(len(documents))]


@st.composite
def documents(draw: st.DrawFn) -> list[list[Tag]]:
    """Tags as a model gives them, best first, with ties."""

    def tags() -> list[Tag]:
        chosen = draw(st.lists(st.sampled_from(KNOWN), unique=True, max_size=6))
        return [(label, score) for label, score in zip(chosen, sorted(draw_scores(len(chosen)), reverse=True), strict=True)]

    def draw_scores(n: int) -> list[float]:
        return draw(st.lists(st.sampled_from([0.125, 0.25, 0.5, 0.75]), min_size=n, max_size=n))

    return [tags() for _ in range(draw(st.integers(0, 4)))]


def overlaps(parents: dict[str, list[str]]) -> bool:
    return bool({*parents, *(label for row in parents.values() for label in row)} & set(KNOWN))


@THOROUGH
@given(
    hierarchies().filter(overlaps), documents(), st.booleans(), st.sampled_from(["off", "first", "only"]),
    st.none() | st.integers(1, 3), st.integers(0, 2),
)  # fmt: skip
def test_tags_against_plain_loops(
    parents: dict[str, list[str]], given: list[list[Tag]], close: bool, specific: str, limit: int | None, branch_level: int
) -> None:
    try:
        chosen = {"close": close, "specific": specific, "per_branch": limit, "branch_level": branch_level}
        hierarchy = bound(parents, **chosen)
    except ConfigError:
        assert (close and specific == "only") or (not close and specific == "off" and limit is None)
        return
    for before, after in zip(given, tags_of(hierarchy, given), strict=True):
        expected = narrowest(before, parents) if specific == "only" else before
        expected = expected if limit is None else limited(expected, parents, limit, branch_level)
        scores = closed(expected, parents) if close else dict(expected)
        assert dict(after) == scores and len(after) == len(scores)
        assert bool(after) == bool(before), "no document loses its last tag"
        order = [label for label, _ in after]
        if specific == "first":
            assert not any(other in above(label, parents) for n, label in enumerate(order) for other in order[:n])
        else:
            assert [score for _, score in after] == sorted((score for _, score in after), reverse=True)
            equal = [(label, other) for n, (label, score) in enumerate(after) for other, same in after[:n] if same == score]
            assert not (close and any(other in above(label, parents) for label, other in equal)), "of equals, the narrow one"
        place = {label: n for n, (label, _) in enumerate(before)}
        last = [max(place[x] for x in place if x in scores and (x == label or label in above(x, parents))) for label in order]
        score_key = [0.0 if specific == "first" else -scores[label] for label in order]
        keys = [(s, n, -level(label, parents)) for s, n, label in zip(score_key, last, order, strict=True)]
        assert keys == sorted(keys), "as the model has them, and a broader one after the last of those below it"


COLOURS = {"crimson": ["red"], "scarlet": ["red"], "red": ["colour"], "navy": ["blue"], "blue": ["colour"], "oak": ["wood"]}


def test_what_each_setting_does() -> None:
    """The example of the documentation."""
    labels = ["red", "crimson", "scarlet", "navy", "oak", "paper"]
    document = [("red", 0.9), ("crimson", 0.8), ("oak", 0.7), ("scarlet", 0.6), ("navy", 0.5), ("paper", 0.4)]

    def tags(**settings: Any) -> list[Tag]:
        return tags_of(bound(COLOURS, labels, **settings), [document])[0]

    assert tags(close=True) == [
        *(("red", 0.9), ("colour", 0.9), ("crimson", 0.8), ("oak", 0.7), ("wood", 0.7), ("scarlet", 0.6)),
        *(("navy", 0.5), ("blue", 0.5), ("paper", 0.4)),
    ]
    assert [label for label, _ in tags(close=True, specific="first")] == [
        *("crimson", "oak", "wood", "scarlet", "red", "navy", "blue", "colour", "paper"),
    ]
    assert [label for label, _ in tags(specific="only")] == ["crimson", "oak", "scarlet", "navy", "paper"]
    assert tags(per_branch=1) == [("red", 0.9), ("crimson", 0.8), ("oak", 0.7), ("paper", 0.4)], "paper is in no branch"
    assert tags(per_branch=1, branch_level=1) == [tag for tag in document if tag[0] != "scarlet"]


def test_labels_beyond_the_bundle_are_numbered_after_it_and_named() -> None:
    hierarchy = bound({"b": ["x"], "a": ["b", "z"], "unused": ["x"]}, ["b", "a", "c"], [None, "A", None], close=True)
    assert hierarchy.labels.to_pydict() == {
        "label": ["b", "a", "c", "x", "z"],
        "name": [None, "A", None, None, None],
        "count": [0, 1, 2, 0, 0],
    }
    assert hierarchy.is_narrowest.tolist() == [False, True, True, False, False] and hierarchy.most_ancestors == 3
    assert hierarchy.notes == [
        "2 parents have no row of their own, such as 'x': they are taken for labels without a parent",
        "1 of the bundle's 3 labels are not in it, such as 'c': they have neither broader nor narrower ones",
    ]
    table = pa.table({"label": ["a", "x"], "parent": ["x", None], "name": ["other", "X"]})
    index = pa.table({"label": ["a", "b"], "name": pa.array(["A", None]), "count": [1, 1]})
    config = HierarchyConfig(table="h.parquet", close=True)
    assert TagHierarchy(Hierarchy.from_table(table), index, config).labels["name"].to_pylist() == ["A", None, "X"]


def test_a_hierarchy_of_other_labels_is_refused() -> None:
    found = "found such as 'blue', while the bundle has 'l0'; of SKOS, hierarchy.key"
    with pytest.raises(DataError, match=f"^the hierarchy has none of the bundle's labels: .*h.parquet; {found}"):
        bound(COLOURS, close=True)


def test_settings_that_contradict_each_other_or_do_nothing() -> None:
    with pytest.raises(ConfigError, match=r"hierarchy\.close adds what hierarchy\.specific = only drops"):
        HierarchyConfig(table="x", close=True, specific="only")
    with pytest.raises(ConfigError, match=r"a hierarchy that changes no tag; set hierarchy\.close, "):
        HierarchyConfig(table="x", branch_level=1)

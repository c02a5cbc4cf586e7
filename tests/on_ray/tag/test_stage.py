"""The stage: a night's tags beside somebody else's columns, and no row lost, whatever batches hold."""

import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray.data
from fruit import read_night, write
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import ConfigError, FiltersConfig, ModelError, PoolConfig, StageConfig, Tagger, tag_dataset
from xmc_ray.bundle.members import Members
from xmc_ray.on_ray.session import own_errors
from xmc_ray.on_ray.tag.stage import as_table, documents_of

POOL = PoolConfig(min=1, max=1, threads=1)
TEXTS = ["a red apple", None, "a green pear", "", " \t", "a yellow plum and a grape"]
REASONS = [None, "text is null", None, "text is empty", "text is empty", None]


@pytest.fixture(scope="module")
def tagger(trained: Path) -> Tagger:
    return Tagger(str(trained / "bundle"), k=3, pool=POOL)


class Near(float):
    """A score; equal to one of another batch, which may be rounded in another way."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-4

    __hash__ = None  # type: ignore[assignment]


def tags_of(table: pa.Table, prefix: str = "") -> list[tuple[Any, ...]]:
    """Labels, names and scores of each row."""
    names = [name for name in ("labels", "names", "scores") if prefix + name in table.column_names]
    columns = [table[prefix + name].to_pylist() for name in names]
    columns[-1] = [[Near(score) for score in scores] for scores in columns[-1]]
    return list(zip(*columns, strict=True))


def test_tags_are_those_of_a_night(tagger: Tagger, fruit: Path, tag: Callable[..., str]) -> None:
    night, _ = read_night(tag(fruit / "test.parquet"))
    documents = pq.read_table(fruit / "test.parquet", columns=["id", "text"])
    ours = tagger(documents)
    rows = pc.index_in(documents["id"], value_set=night["id"].combine_chunks())
    assert tags_of(ours) == tags_of(night.take(rows)) and len(ours) == 48
    for name in ("labels", "scores", "names"):
        assert ours.schema.field(name).type.value_type == night.schema.field(name).type.value_type


def test_all_columns_pass_and_all_rows_stay(tagger: Tagger) -> None:
    """Their types as well: a column that Arrow calls large, a list, a dictionary, one with nulls alone."""
    table = pa.table(
        {
            "price": pa.array([1, None, 3, 4, 5, 6], pa.decimal128(9, 2)),
            "text": pa.chunked_array([TEXTS[:2], TEXTS[2:]], pa.large_string()),
            "pages": [[1, 2], [], None, [3], [4], [5]],
            "kind": pa.array(list("aabbcc")).dictionary_encode(),
            "nothing": pa.nulls(6),
        }
    )
    tagged = tagger(table)
    assert tagged.select(table.column_names).equals(table)
    assert tagged.column_names[5:] == ["labels", "scores", "names", "reason"]
    assert tagged["reason"].to_pylist() == REASONS
    assert [len(labels) for labels in tagged["labels"].to_pylist()] == [3, 0, 3, 0, 0, 3]
    assert tagged["labels"].null_count == tagged["scores"].null_count == 0
    assert {"fruit", "red", "apple"} == set(tagged["labels"][0].as_py())
    assert "RED" in tagged["names"][0].as_py() and tagged["scores"].to_pylist()[0] == sorted(tagged["scores"][0].as_py())[::-1]
    nothing = tagger(table.slice(0, 0))
    assert nothing.schema == tagged.schema and len(nothing) == 0


@pytest.mark.parametrize(
    "made", [pd.DataFrame, lambda columns: {name: np.array(values, object) for name, values in columns.items()}]
)
def test_batches_of_other_formats_are_the_same(tagger: Tagger, made: Callable[[Any], Any]) -> None:
    columns = {"text": TEXTS, "row": list(range(6))}
    assert tagger(made(columns)).to_pylist() == tagger(pa.table(columns)).to_pylist()
    images = {"text": np.array(["a red apple"]), "image": np.zeros((1, 2, 2)), "lists": [["a", "b"]], "gap": np.array([np.nan])}
    tagged = tagger(images)
    assert tagged["image"].combine_chunks().to_numpy().shape == (1, 2, 2), "as Ray Data has it"
    assert tagged["lists"].to_pylist() == [["a", "b"]] and math.isnan(tagged["gap"][0].as_py())


def test_values_that_are_no_strings_have_a_reason(tagger: Tagger, tmp_path: Path) -> None:
    """Ray Data pickles columns of values of several types; what would have to be imported to be read is not."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    values = ["a red apple", 5, None, float("nan"), Trap(), b"a pear", ["a plum"], "a half \ud800", True, "a green pear"]
    mixed = ray.data.extensions.object_extension.ArrowPythonObjectArray.from_objects(values)
    tagged = tagger(pa.table({"text": mixed}))
    no = "text is not a string"
    null = "text is null"
    assert tagged["reason"].to_pylist() == [None, no, null, null, no, None, no, "text is not UTF-8", no, None]
    assert [len(labels) > 0 for labels in tagged["labels"].to_pylist()] == [True, *[False] * 4, True, *[False] * 3, True]
    assert not (tmp_path / "sprung").exists()
    assert tagger(pa.table({"text": [1, 2, None]}))["reason"].to_pylist() == [no, no, null]
    damaged = pa.ExtensionArray.from_storage(mixed.type, pa.array([b"", b"\x80", pickle.dumps("a")], pa.large_binary()))
    assert tagger(pa.table({"text": damaged}))["reason"].to_pylist() == [no, no, None]


ANYTHING = (
    st.none() | st.text(st.characters(), max_size=4) | st.integers() | st.floats() | st.booleans() | st.binary(max_size=3)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(ANYTHING, max_size=6))
def test_reasons_of_mixed_columns_are_those_of_one_value_after_the_other(values: list[Any]) -> None:
    array = np.empty(len(values), object)
    array[:] = values
    reasons = documents_of(as_table({"text": array}), StageConfig().rules)["reason"].to_pylist()
    if all(value is None or type(value) in (int, float, bool) for value in values):  # Arrow has a type for numbers
        assert [reason in ("text is null", "text is not a string") for reason in reasons] == [True] * len(values)
    else:
        assert reasons == [_reason(value) for value in values]


def _reason(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "text is null"
    if not isinstance(value, str | bytes):
        return "text is not a string"
    raw = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
    text = raw.decode(errors="ignore")
    if text.encode() != raw:
        return "text is not UTF-8"
    return None if text.strip() else "text is empty"


def test_text_of_several_columns_ids_and_lengths(trained: Path) -> None:
    table = pa.table({"title": ["a red", "", None, "a"], "body": ["apple", "a plum", None, "b" * 99], "sku": [1, 2, 3, None]})
    bundle = str(trained / "bundle")
    two = Tagger(bundle, text=["title", "body"], separator=" ", k=3, pool=POOL)(table)
    assert two["reason"].to_pylist() == [None, None, "text is null", None]
    joined = Tagger(bundle, k=3, pool=POOL)(pa.table({"text": ["a red apple", "a plum"]}))
    assert tags_of(two)[:2] == tags_of(joined)
    strict = Tagger(bundle, text=["title", "body"], id="sku", max_bytes=50, k=3, pool=POOL)(table)
    assert strict["reason"].to_pylist() == [None, None, "text is null", "id is null"]
    short = Tagger(bundle, text="body", max_bytes=50, pool=POOL)(table)
    assert short["reason"].to_pylist()[3] == "text is too long"


def test_scores_too_low_are_no_tags(tagger: Tagger, trained: Path) -> None:
    table = pa.table({"text": ["a red apple", None]})
    bundle = str(trained / "bundle")
    least = tagger(table)["scores"][0].as_py()[1]
    kept = Tagger(bundle, k=3, min_score=least, pool=POOL)(table)
    assert kept["labels"].to_pylist() == [tagger(table)["labels"][0].as_py()[:2], []]
    precise = Tagger(bundle, k=3, min_precision=0.999, prefix="p_", pool=POOL)(table)
    never = np.isinf(Members.read(bundle).thresholds(0.999)).all()
    assert precise.column_names[1:] == ["p_labels", "p_scores", "p_names", "p_reason"]
    assert (precise["p_labels"].to_pylist() == [[], []]) or not never


def test_wrong_columns_and_settings_are_one_line(tagger: Tagger, trained: Path, bundles: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'text'; found title; set text or id"):
        tagger(pa.table({"title": ["a"]}))
    with pytest.raises(ConfigError, match="columns of these names already; found labels, reason; set prefix"):
        tagger(pa.table({"text": ["a"], "labels": ["b"], "reason": ["c"]}))
    for wrong in (
        {"k": 0},
        {"min_score": 2.0},
        {"text": []},
        {"min_precision": 1.0},
        {"precision": "float16"},
        {"filters": {"deny": ["apple"]}},
    ):
        with pytest.raises(ConfigError):
            StageConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no column 'tenant'; found text; set filters\.column"):
        Tagger(str(trained / "bundle"), pool=POOL, filters=by_tenant(tmp_path))(pa.table({"text": ["a"]}))
    with pytest.raises(ConfigError, match=r"filters\.deny has labels that no label of the bundle has"):
        Tagger(str(trained / "bundle"), pool=POOL, filters=FiltersConfig(deny=["unheard of"]))
    with pytest.raises(TypeError, match="labels"):
        Tagger(str(trained / "bundle"), labels=3)
    with pytest.raises(ConfigError, match="min_precision needs a calibrated bundle"):
        Tagger(bundles[1], min_precision=0.5, pool=POOL)


def test_an_actor_that_finds_another_bundle_says_so(bundles: list[str], tmp_path: Path) -> None:
    place = shutil.copytree(bundles[0], tmp_path / "bundle")
    members = Members.read(str(place))
    shutil.rmtree(place)
    shutil.copytree(bundles[1], place)
    with pytest.raises(ModelError, match="bundle"):
        Tagger(members, pool=POOL)


def test_several_bundles_are_an_ensemble(bundles: list[str]) -> None:
    tagged = Tagger(bundles, k=3, pool=POOL)(pa.table({"text": TEXTS}))
    assert tagged["reason"].to_pylist() == REASONS
    assert "apple" in tagged["labels"][0].as_py()


TENANTS = {"colours": ["green", "red", "yellow"], "kinds": ["apple", "pear", "plum"]}


def by_tenant(tmp_path: Path) -> FiltersConfig:
    pairs = [{"label": label, "tenant": tenant} for tenant, labels in TENANTS.items() for label in labels]
    return FiltersConfig(column="tenant", by="tenant", table=str(write(tmp_path / "tenants.parquet", pairs)))


def test_each_row_gets_labels_of_its_filter(trained: Path, tmp_path: Path, tag: Callable[..., str]) -> None:
    """As in a night; a row that names no filter that there is has a reason."""
    tenants = ["colours", "kinds", "nobody", None, 7, "colours"]
    rows = [{"id": str(n), "text": "a red apple", "tenant": tenant} for n, tenant in enumerate(tenants)]
    config = by_tenant(tmp_path)
    tagger = Tagger(str(trained / "bundle"), k=3, pool=POOL, filters=config)
    tagged = tagger({name: np.array([row[name] for row in rows], object) for name in ("text", "tenant")})
    unknown = "filter is unknown"
    assert tagged["reason"].to_pylist() == [None, None, unknown, "filter is null", unknown, None]
    assert [len(labels) for labels in tagged["labels"].to_pylist()] == [3, 3, 0, 0, 0, 3]
    for tenant, labels in zip(tenants, tagged["labels"].to_pylist(), strict=True):
        assert set(labels) <= set(TENANTS.get(tenant, ()))  # type: ignore[arg-type]
    good = pa.Table.from_pylist([rows[0], rows[1], rows[5]])
    pq.write_table(good, tmp_path / "in.parquet")
    filters = ["--filters.column=tenant", "--filters.by=tenant", f"--filters.table={config.table}"]
    assert tags_of(tagger(good)) == tags_of(read_night(tag(tmp_path / "in.parquet", *filters))[0].sort_by("id"))
    denied = Tagger(str(trained / "bundle"), k=3, pool=POOL, filters=FiltersConfig(deny=["apple"]))(good)
    assert all(len(labels) == 3 and "apple" not in labels for labels in denied["labels"].to_pylist())


@pytest.mark.usefixtures("ray_session")
def test_filters_of_a_dataset_are_read_once(trained: Path, tmp_path: Path) -> None:
    config, rows = by_tenant(tmp_path), [{"text": "a red apple", "tenant": [*TENANTS][n % 2]} for n in range(8)]
    dataset = ray.data.from_items(rows)
    tagged = tag_dataset(dataset, str(trained / "bundle"), pool=POOL, k=2, filters=config)
    Path(str(config.table)).unlink()
    for row in tagged.take_all():
        assert len(row["labels"]) == 2 and set(row["labels"]) <= set(TENANTS[row["tenant"]])


def test_filters_over_the_labels_of_another_bundle_are_refused(tagger: Tagger, trained: Path) -> None:
    """Their ids would be other labels here."""
    members = Members.read(str(trained / "bundle"))
    filters = StageConfig(filters=FiltersConfig(allow=["apple"])).of(members).filters
    table = pa.table({"text": ["a red apple"]})
    assert Tagger(members, k=1, pool=POOL, filters=filters)(table)["labels"].to_pylist() == [["apple"]]
    with pytest.raises(ConfigError, match="labels of another bundle; found that of an unknown one; give a FiltersConfig"):
        Tagger(members, k=1, pool=POOL, filters=replace(filters, of=None))


def test_a_pool_of_nothing_but_a_device_takes_the_threads_there_are(trained: Path) -> None:
    members = Members.read(str(trained / "bundle"))
    for pool in (PoolConfig(), PoolConfig(min=2), None):
        assert Tagger(members, k=1, pool=pool)(pa.table({"text": ["a red apple"]}))["reason"].to_pylist() == [None]


def test_a_batch_without_rows_and_columns_is_one_without_tags(tagger: Tagger) -> None:
    for table in (pa.table({}), pa.table({"text": pa.nulls(0, pa.string())})):
        assert len(tagged := tagger(table)) == 0 and tagged.column_names[-1] == "reason"


def reading(tmp_path: Path, rows: int = 20) -> ray.data.Dataset:
    kinds = ["a red apple", None, "a green pear", " "]
    rows_ = [{"sku": number, "title": kinds[number % 4], "labels": [number]} for number in range(rows)]
    return ray.data.read_parquet(str(write(tmp_path / "documents.parquet", rows_)))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("batch_format", ["pyarrow", "pandas", "default"])
def test_in_a_pipeline_of_any_format(trained: Path, tmp_path: Path, batch_format: str) -> None:
    settings: Mapping[str, Any] = {"bundle": Members.read(str(trained / "bundle")), "text": "title", "prefix": "x_", "k": 3}
    batches = {"batch_size": 8, "batch_format": batch_format, "compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 1}
    dataset = reading(tmp_path).map_batches(Tagger, fn_constructor_kwargs=settings, **batches)
    dataset.write_parquet(str(tmp_path / "out"))
    written = pq.read_table(tmp_path / "out").sort_by("sku")
    assert written["sku"].to_pylist() == list(range(20))
    assert written["labels"].to_pylist() == [[number] for number in range(20)]
    assert written["x_reason"].to_pylist() == [None, "text is null", None, "text is empty"] * 5
    here = Tagger(**settings, pool=POOL)(pa.table({"title": ["a red apple", None, "a green pear", ""]}))
    assert tags_of(written, "x_") == tags_of(here, "x_") * 5
    assert {name: str(written.schema.field(name).type.value_type) for name in ("x_labels", "x_scores")} == {
        "x_labels": "string",
        "x_scores": "float",
    }


@pytest.mark.usefixtures("ray_session")
def test_a_dataset_is_tagged_when_it_is_consumed(trained: Path, tmp_path: Path) -> None:
    """Blocks without rows, and rows of several types, included."""
    bundle, settings = str(trained / "bundle"), {"text": "title", "prefix": "x_", "k": 3}
    source = reading(tmp_path)
    tagged = tag_dataset(source.filter(lambda row: row["sku"] < 9), bundle, pool=POOL, batch_rows=4, **settings)
    table = pa.concat_tables(map(as_table, tagged.iter_batches(batch_format="pyarrow"))).sort_by("sku")
    here = Tagger(bundle, pool=POOL, **settings)(pq.read_table(tmp_path / "documents.parquet").slice(0, 9))
    assert table.column_names == here.column_names
    assert tags_of(table, "x_") == tags_of(here, "x_")
    assert table.drop_columns(["x_scores"]).to_pylist() == here.drop_columns(["x_scores"]).to_pylist()
    # in one block: blocks of different types Ray Data does not join into a batch, whoever asks for it
    mixed = ray.data.from_items([{"title": "a red apple"}, {"title": 5}, {"title": None}], override_num_blocks=1)
    rows = tag_dataset(mixed, bundle, pool=POOL, **settings).take_all()
    assert sorted(str(row["x_reason"]) for row in rows) == ["None", "text is not a string", "text is null"]


@pytest.mark.usefixtures("ray_session")
def test_columns_that_are_called_like_the_stage_s_own_stay(trained: Path) -> None:
    bundle = str(trained / "bundle")
    rows = [{"text": "a red apple", "xmc_ray.source": "shop", "xmc_ray.price": 7}]
    (row,) = tag_dataset(ray.data.from_items(rows), bundle, pool=POOL, k=1, prefix="xmc_ray.new_").take_all()
    assert {name: row[name] for name in rows[0]} == rows[0] and len(row["xmc_ray.new_labels"]) == 1
    taken = ray.data.from_items([{"text": "a red apple", "xmc_ray.reason": None}])
    with pytest.raises(ConfigError, match=r"columns of the stage's own; found xmc_ray\.reason"), own_errors():
        tag_dataset(taken, bundle, pool=POOL, k=1).take_all()


@pytest.mark.usefixtures("ray_session")
def test_what_is_wrong_is_said_before_a_dataset_is_read(trained: Path, tmp_path: Path, bundles: list[str]) -> None:
    bundle, source = str(trained / "bundle"), reading(tmp_path)
    with pytest.raises(ConfigError, match="no column 'text'; found sku, title, labels"):
        tag_dataset(source, bundle, pool=POOL, prefix="x_")
    with pytest.raises(ConfigError, match="names already; found labels"):
        tag_dataset(source, bundle, pool=POOL, text="title")
    with pytest.raises(ConfigError, match="min_precision needs a calibrated bundle"):
        tag_dataset(source, bundles[1], pool=POOL, text="title", prefix="x_", min_precision=0.5)
    with pytest.raises(ModelError, match="not a finished bundle"):
        tag_dataset(source, str(tmp_path), pool=POOL, text="title", prefix="x_")
    late = tag_dataset(source.map_batches(lambda batch: batch), bundle, pool=POOL)  # whose columns nobody knows by now
    with pytest.raises(ConfigError, match="no column 'text'"), own_errors():
        late.take_all()

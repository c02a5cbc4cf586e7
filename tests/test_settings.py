"""Bounds of settings, in Python and on the command line; what may change when a job is resumed."""

import importlib
import json
import pkgutil
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

import xmc_ray
from xmc_ray import command
from xmc_ray.bundle.explain import ExplainConfig
from xmc_ray.bundle.extend import ExtendConfig
from xmc_ray.bundle.regression import RowsConfig
from xmc_ray.data.convert import ConvertConfig
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.feedback import FeedbackConfig
from xmc_ray.data.filters import FilterConfig, FiltersConfig
from xmc_ray.data.groups import GroupsConfig
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.tag_hierarchy import HierarchyConfig
from xmc_ray.errors import ConfigError
from xmc_ray.metrics.drift import DriftConfig
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig
from xmc_ray.model.tokenizer import TextConfig
from xmc_ray.on_ray.evaluate import EvaluateConfig, EvaluationPoolConfig, GateConfig
from xmc_ray.on_ray.pool import PoolConfig
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.rerank import RerankConfig
from xmc_ray.on_ray.tag.retention import KeepConfig, NightsConfig
from xmc_ray.on_ray.tag.stage import StageConfig
from xmc_ray.on_ray.train.config import ReportConfig, TrainConfig, WorkersConfig
from xmc_ray.on_ray.train.tune import TuneConfig
from xmc_ray.settings import MAY_CHANGE_ON_RESUME, PositiveInt, Settings, Share, changeable, difference, fixed_settings
from xmc_ray.show.server import ShowConfig
from xmc_ray.training.checkpoint import CheckpointsConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig

DOCUMENTS = DocumentsConfig(uri="x")
REQUIRED: dict[type, dict[str, Any]] = {
    ConvertConfig: {"layout": "json", "documents": "x", "output": "y.parquet"},
    DocumentsConfig: {"uri": "x"},
    EvaluateConfig: {"documents": DOCUMENTS, "bundle": "x"},
    ExplainConfig: {"bundle": "x", "text": "y", "label": "z"},
    ExtendConfig: {"bundle": "x", "output": "y"},
    HierarchyConfig: {"table": "x", "close": True},
    NightsConfig: {"action": "list", "output": "x"},
    ShowConfig: {"folder": "x"},
    GateConfig: {"documents": DOCUMENTS, "at_least": {"P@1": 0.5}},
    TextConfig: {"fields": {"title": 1.0}},
    RerankConfig: {"function": "package.module:name", "version": "1"},
    TagConfig: {"documents": DOCUMENTS, "bundle": "x", "output": "y"},
    TrainConfig: {"documents": DOCUMENTS, "output": "y"},
    TuneConfig: {"documents": DOCUMENTS, "output": "y"},
}

TINY, LARGE = 1e-9, 1e9
AT_LEAST_1, AT_LEAST_0 = ([1, 2, 10**6], [0, -1]), ([0, 1, 10**6], [-1])
ABOVE_0, NOT_NEGATIVE = ([TINY, 1, LARGE], [0.0, -TINY]), ([0, TINY, LARGE], [-TINY])
SHARE, OPEN = ([0, TINY, 0.5, 1], [-TINY, 1 + TINY]), ([TINY, 1 - TINY], [0.0, 1.0, -TINY])

# (values just inside, values just outside) of every setting that is a number
BOUNDS: dict[type, dict[str, tuple[list[Any], list[Any]]]] = {
    CheckpointsConfig: {"steps": AT_LEAST_1, "minutes": ABOVE_0, "keep_last": AT_LEAST_1},
    ConvertConfig: {"rows": AT_LEAST_1},
    DocumentsConfig: {"max_bytes": AT_LEAST_1, "text": ([["a"]], [[]])},
    DriftConfig: {"warn": NOT_NEGATIVE, "fail": ([0.1, LARGE], [-TINY])},
    EncoderConfig: {
        "layers": AT_LEAST_0,
        "max_tokens": AT_LEAST_1,
        "feature_layers": AT_LEAST_1,
        "freeze": AT_LEAST_0,
        "dropout": SHARE,
    },
    EvaluateConfig: {
        "ks": ([[1], [5, 1], [1000]], [[], [0], [1, -1], [1001]]),
        "min_precision": OPEN,
        "max_reject_share": SHARE,
    },
    ExplainConfig: {"nearest": AT_LEAST_1},
    ExtendConfig: {"max_reject_share": SHARE},
    GateConfig: {
        "at_least": ([{"P@1": 0}, {"P@1": 1}], [{"P@1": -TINY}, {"P@1": 1 + TINY}, {"P@1": float("nan")}]),
        "max_reject_share": SHARE,
    },
    HierarchyConfig: {"per_branch": AT_LEAST_1, "branch_level": AT_LEAST_0},
    KeepConfig: {"nights": AT_LEAST_1},
    NightsConfig: {"keep": AT_LEAST_1, "last": AT_LEAST_1},
    FeedbackConfig: {"weight": ABOVE_0},
    ShowConfig: {"port": ([0, 65535], [-1, 65536])},
    GroupsConfig: {"max_size": AT_LEAST_1, "features": AT_LEAST_1, "seed": AT_LEAST_0},
    LexicalConfig: {"width": AT_LEAST_0, "columns": AT_LEAST_1, "rarest": AT_LEAST_1},
    LinearConfig: {
        "candidates": AT_LEAST_0,
        "depth": AT_LEAST_1,
        "weight": NOT_NEGATIVE,
        "cost": ABOVE_0,
        "smallest": NOT_NEGATIVE,
    },
    LoopConfig: {
        "epochs": AT_LEAST_1,
        "minutes": ABOVE_0,
        "batch_size": ([1, 4096], [0, 4097]),
        "accumulate": AT_LEAST_1,
        "window": AT_LEAST_1,
        "token_budget": AT_LEAST_0,
        "seed": AT_LEAST_0,
    },
    ModelConfig: {
        "shortlist": AT_LEAST_1,
        "bottleneck": ([8, 384], [0, -8, 4, 12]),
        "dropout": SHARE,
        "lift": ([0, 2], [-TINY, 2 + TINY]),
    },
    OptimConfig: {
        **dict.fromkeys(("encoder_lr", "head_lr", "rows_lr", "lexical_lr", "weight_decay", "clip_norm"), NOT_NEGATIVE),
        "lexical_power": ([0, 0.5], [-TINY, 0.5 + TINY]),
        "warmup": SHARE,
        "swa_start": SHARE,
        "swa_every": AT_LEAST_1,
    },
    PoolConfig: {
        "min": AT_LEAST_1,
        "max": AT_LEAST_0,
        "cpus": AT_LEAST_1,
        "threads": ([0, 1, 1024], [-1, 1025]),
        "token_budget": ([0, 1, 200_000], [-1, 200_001]),
        "patience": NOT_NEGATIVE,
    },
    EvaluationPoolConfig: {"batch_rows": ([1, 65_536], [0, 65_537])},
    PredictConfig: {"token_budget": AT_LEAST_0},
    ReportConfig: {"documents": AT_LEAST_0},
    RerankConfig: {"candidates": AT_LEAST_1},
    RowsConfig: {"penalty": ABOVE_0, "steps": AT_LEAST_1, "join": SHARE},
    StageConfig: {"max_bytes": AT_LEAST_1, "k": AT_LEAST_1, "min_score": SHARE, "min_precision": OPEN},
    TagConfig: {
        "k": AT_LEAST_1,
        "min_score": SHARE,
        "min_precision": OPEN,
        "max_reject_share": SHARE,
        "commit_rows": ([2], [1, 0]),
        "target_bytes": AT_LEAST_1,
    },
    TextConfig: {
        "max_tokens": AT_LEAST_1,
        "fields": (
            [{"title": TINY}, {"title": 2, "body": 0.5}],
            [{"title": 0}, {"a": 1, "b": -1}, {"a": float("inf")}, {"a": float("nan")}],
        ),
        "first": ([{"title": 1}], [{"title": 0}, {"title": -1}]),
    },
    TrainConfig: {"report_seconds": NOT_NEGATIVE, "max_reject_share": SHARE},
    TuneConfig: {"members": AT_LEAST_1, "minutes": ABOVE_0, "search": OPEN, "seed": AT_LEAST_0, "max_reject_share": SHARE},
    ValidationConfig: {"share": ([0, 1 - TINY], [-TINY, 1.0]), "every": ABOVE_0},
    WorkersConfig: {
        "count": AT_LEAST_1,
        "least": ([1], [0]),
        "cpus": AT_LEAST_1,
        "threads": AT_LEAST_0,
        "max_failures": ([-1, 0], [-2]),
        "patience": NOT_NEGATIVE,
    },
}
CASES = [(kind, name) for kind, settings in BOUNDS.items() for name in settings]


def make(kind: type, **values: Any) -> Any:
    further = {"min": 1} if kind is PoolConfig and values.get("max") else {}
    further |= {"max": values["min"]} if "min" in values else {}
    further |= {"fail": None, "warn": 0.0} if kind is DriftConfig else {}
    return kind(**{**REQUIRED.get(kind, {}), **further, **values})


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_a_setting_has_its_bounds(kind: type, name: str) -> None:
    inside, outside = BOUNDS[kind][name]
    for value in inside:
        assert getattr(make(kind, **{name: value}), name) == value
    numeric = [] if isinstance(inside[0], list | dict) else [float("nan"), "1", True]
    for value in [*outside, *numeric]:
        with pytest.raises(ConfigError, match=rf"invalid value of {kind.__name__}\.{name}; found .*; expected .+") as refused:
            make(kind, **{name: value})
        assert "\n" not in str(refused.value)


def test_every_number_has_bounds() -> None:
    for module in pkgutil.walk_packages(xmc_ray.__path__, "xmc_ray."):
        importlib.import_module(module.name)

    def numeric(hint: Any) -> bool:
        return hint in (int, float) or any(map(numeric, get_args(hint)))

    kinds = {kind for kind in Settings.__subclasses__() if kind.__module__.startswith("xmc_ray.")} | {TrainConfig}
    numbers = {(kind, name) for kind in kinds for name, hint in get_type_hints(kind).items() if numeric(hint)}
    assert numbers <= {*CASES}
    assert len(kinds) > 20


def test_what_is_said_of_a_value_out_of_bounds() -> None:
    for kind, values, words in (
        (LoopConfig, {"epochs": 0}, "LoopConfig.epochs; found 0; expected at least 1"),
        (LoopConfig, {"minutes": 0}, "LoopConfig.minutes; found 0; expected above 0 or None"),
        (LoopConfig, {"precision": "half"}, "found 'half'; expected 'auto' or 'float32' or 'bfloat16'"),
        (ModelConfig, {"bottleneck": 12}, "found 12; expected at least 8, a multiple of 8"),
        (EvaluateConfig, {"ks": [1, 0]}, "found 0; expected 1 or more items, each at least 1"),
        (DocumentsConfig, {"text": []}, r"found \[\]; expected 1 or more items"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(kind, **values)
    with pytest.raises(ConfigError, match="epochs; found -1"):
        replace(LoopConfig(), epochs=-1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--loop.epochs=0"], "invalid value of loop.epochs; found 0; expected at least 1"),
        (["--optim.warmup=1.5"], "invalid value of optim.warmup; found 1.5; expected at least 0, at most 1"),
        (["--validation.share=1"], "invalid value of validation.share; found 1.0; expected at least 0, below 1"),
        (["--documents.max_bytes=0"], "invalid value of documents.max_bytes"),
        (["--workers.least=3"], "workers.least is above workers.count; found 3; expected at most 1"),
    ],
)
def test_the_command_line_names_the_setting(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        command.parse(TrainConfig, ["--documents.uri=x", "--output=y", *options])
    assert str(refused.value).startswith(words)


def test_settings_of_an_optional_part_have_bounds_and_dotted_names() -> None:
    options = ["--documents.uri=x", "--bundle=y", "--output=z", "--gate.documents.uri=x", '--gate.at_least={"P@1": 0.5}']
    assert command.parse(TagConfig, options).gate == GateConfig(documents=DOCUMENTS, at_least={"P@1": 0.5})
    with pytest.raises(ConfigError, match=r"invalid value of gate\.documents\.max_bytes; found 0"):
        command.parse(TagConfig, [*options, "--gate.documents.max_bytes=0"])


# -- what may change on resume -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part(Settings):
    rate: Share = 0.5
    note: str = field(default="", metadata=MAY_CHANGE_ON_RESUME)


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    output: str = field(metadata=MAY_CHANGE_ON_RESUME)
    k: PositiveInt = 1
    column: str | None = "id"
    names: list[str] = field(default_factory=list)
    part: Part = field(default_factory=Part)
    workers: Part = field(default_factory=Part, metadata=MAY_CHANGE_ON_RESUME)


def test_what_counts_and_what_does_not() -> None:
    job = Job(output="x", part=Part(note="y"))
    assert changeable(job) == {"output", "workers"}
    assert fixed_settings(job) == {"k": 1, "column": "id", "names": [], "part": {"rate": 0.5}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": "z", "workers": Part(rate=0.1)}, None),
        ({"part": Part(note="z")}, None),
        ({"k": 2}, ("k", 1, 2)),
        ({"column": None}, ("column", "id", None)),
        ({"names": ["a"]}, ("names", [], ["a"])),
        ({"part": Part(rate=0.25), "names": []}, ("part.rate", 0.5, 0.25)),
    ],
)
def test_the_first_difference(changes: dict[str, Any], expected: Any) -> None:
    before = Job(output="x")
    assert difference(fixed_settings(before), fixed_settings(replace(before, **changes))) == expected


def test_a_setting_that_was_not_there_before_is_a_difference() -> None:
    assert difference({"k": 1}, {"k": 1, "part": {"rate": 0.5}}) == ("part", None, {"rate": 0.5})
    assert difference({"k": 1, "int8": False}, {"k": 1}) is None
    assert difference({"model": {"int8": False}}, {"model": {"precision": "auto"}}) is None
    assert difference({"model": {}}, {"model": {"precision": "bfloat16"}}) == ("model.precision", None, "bfloat16")
    assert difference({"model": {"int8": True}}, {"model": {}}) == ("model.int8", True, None)
    off = {"column": None, "deny": [], "named": {}}
    assert difference({}, {"filters": off}) is None and difference({"filters": off}, {}) is None
    assert difference({}, {"filters": off | {"deny": ["a"]}}) == ("filters", None, off | {"deny": ["a"]})


def test_settings_by_name_count_and_are_written_as_toml() -> None:
    filters = FiltersConfig(column="tenant", named={"a": FilterConfig(allow=["x"]), "b": FilterConfig()})
    config = make(TagConfig, filters=filters)
    known = fixed_settings(config)
    assert json.loads(json.dumps(known)) == known and known["filters"]["named"]["a"]["allow"] == ["x"]
    other = replace(config, filters=replace(filters, named={"a": FilterConfig(allow=["y"]), "b": FilterConfig()}))
    assert difference(known, fixed_settings(other)) == ("filters.named.a.allow", ["x"], ["y"])
    assert command.resumed(config, command.to_toml(config)) == config


@pytest.mark.parametrize("column", ["id", "other", None])
def test_a_job_is_resumed_from_its_toml(column: str | None) -> None:
    began = Job(output="before", k=3, column=column, workers=Part(rate=0.25))
    now = Job(output="now", column="whatever", workers=Part(rate=0.75))
    assert command.resumed(now, command.to_toml(began)) == replace(began, output="now", workers=Part(rate=0.75))


def test_settings_that_went_do_not_matter_where_they_might_have_changed() -> None:
    now = Job(output="now")
    assert command.resumed(now, 'output = "x"\n[workers]\nspeed = 1\n') == now
    with pytest.raises(ConfigError, match=r"part.*speed.*another version"):
        command.resumed(now, 'output = "x"\n[part]\nspeed = 1\n')
    with pytest.raises(ConfigError, match="invalid settings"):
        command.resumed(now, "output = \n")


@pytest.mark.parametrize("kind", [TrainConfig, TagConfig])
def test_what_may_change_in_the_jobs(kind: type) -> None:
    changing = {
        TrainConfig: "output resume max_reject_share cache calibration checkpoints workers report report_seconds callbacks",
        TagConfig: "output date max_reject_share overwrite commit_rows target_bytes pool gate drift table keep",
    }
    assert changeable(make(kind)) == set(changing[kind].split())
    assert {each.name for each in fields(kind)} > changeable(make(kind))


def test_numpy_numbers() -> None:
    assert OptimConfig(warmup=np.float64(0.5)).warmup == 0.5

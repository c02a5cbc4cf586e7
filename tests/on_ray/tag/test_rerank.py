"""A hook that scores candidates again: in a stage and in a night, with its errors, and as a part of what a night is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hooks
import numpy as np
import pyarrow as pa
import pytest
from fruit import manifest_of, read_night, write
from in_process import InProcess

from xmc_ray import ConfigError, ModelError, PoolConfig, RerankConfig, StageConfig, Tagger
from xmc_ray.on_ray.tag.runner import Runner

POOL = PoolConfig(min=1, max=1, threads=1)
TEXTS = ["a red apple", None, "a green pear", "", "a yellow plum"]


def tagged(trained: Path, hook: str, texts: list[str | None] = TEXTS, **settings: Any) -> pa.Table:
    candidates = settings.pop("candidates", 50)
    rerank = RerankConfig(function=f"hooks:{hook}", version="1", candidates=candidates)
    return Tagger(str(trained / "bundle"), pool=POOL, rerank=rerank, **settings)(pa.table({"text": texts}))


def test_tags_are_the_best_by_the_hook(trained: Path) -> None:
    """As a loop over all candidates has it; those with equal scores stay in the order of the model."""
    ours = tagged(trained, "by_label", k=3)
    every = Tagger(str(trained / "bundle"), k=50, pool=POOL)(pa.table({"text": TEXTS}))
    for row, model in zip(ours.to_pylist(), every.to_pylist(), strict=True):
        pairs = zip(model["labels"], model["scores"], strict=True)
        best = sorted(((-hooks.SCORES.get(label, score / 2), rank, label) for rank, (label, score) in enumerate(pairs)))[:3]
        assert row["labels"] == [label for *_, label in best] and row["reason"] == model["reason"]
        np.testing.assert_allclose(row["scores"], [-score for score, *_ in best], rtol=1e-6)
    assert ours["labels"][0].as_py()[0] == "apple" and ours["names"][0].as_py()[0] is None
    assert ours["labels"][1].as_py() == ours["labels"][3].as_py() == []


def test_a_class_is_made_once_and_sees_texts_and_names(trained: Path) -> None:
    hooks.InText.made = 0
    found = tagged(trained, "InText", min_score=0.5, k=5)
    assert [set(labels) for labels in found["labels"].to_pylist()] == [
        {"red", "apple"},
        set(),
        {"green", "pear"},
        set(),
        {"yellow", "plum"},
    ]
    assert hooks.InText.made == 1
    assert tagged(trained, "fails", [None, ""])["labels"].to_pylist() == [[], []], "a hook is not asked about nothing"


def test_only_candidates_are_scored(trained: Path) -> None:
    model = Tagger(str(trained / "bundle"), k=2, pool=POOL)(pa.table({"text": TEXTS}))
    few = tagged(trained, "by_label", k=2, candidates=2)
    assert [set(labels) for labels in few["labels"].to_pylist()] == [set(labels) for labels in model["labels"].to_pylist()]


@pytest.mark.parametrize(
    ("hook", "line"),
    [
        ("fails", "the hook fails: hooks:fails; found RuntimeError: out of luck"),
        ("CannotBeMade", "the hook fails: hooks:CannotBeMade; found OSError: no weights"),
        (
            "not_finite",
            r"no scores: hooks:not_finite; found 1 others, such as nan; expected \d+ numbers in 0..1, one a candidate",
        ),
        ("infinite", r"hooks:infinite; found \d+ others, such as inf"),
        ("logits", r"hooks:logits; found \d+ others, such as -"),
        ("too_few", r"hooks:too_few; found shape \(\d+,\)"),
        ("in_words", "hooks:in_words; found list: could not convert string"),
        ("far_too_large", "hooks:far_too_large; found list: int too large to convert to float"),
        ("guarded", "hooks:guarded; found _Guarded: requires grad"),
        ("nothing", r"hooks:nothing; found shape \(\)"),
    ],
)
def test_what_a_hook_does_wrong_is_one_line_with_its_name(trained: Path, hook: str, line: str) -> None:
    with pytest.raises(ModelError, match=line):
        tagged(trained, hook)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"function": "hooks"}, "names no function; found hooks; expected package.module:name"),
        ({"function": "hooks:"}, "names no function"),
        ({"version": ""}, "invalid value of RerankConfig.version"),
        ({"candidates": 0}, "invalid value of RerankConfig.candidates"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        RerankConfig(**{"function": "hooks:by_label", "version": "1"} | settings)


def test_settings_that_do_not_go_together() -> None:
    rerank = RerankConfig(function="hooks:by_label", version="1", candidates=5)
    with pytest.raises(ConfigError, match=r"rerank\.candidates is below k; found 5; expected at least 6"):
        StageConfig(k=6, rerank=rerank)
    with pytest.raises(ConfigError, match="min_precision and rerank exclude each other"):
        StageConfig(k=2, min_precision=0.5, rerank=rerank)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("no_such_module:hook", "cannot be imported: no_such_module:hook; found ModuleNotFoundError"),
        ("hooks:no_such_hook", "cannot be imported: hooks:no_such_hook; found AttributeError"),
        ("hooks:NOT_CALLABLE", "cannot be called: hooks:NOT_CALLABLE; found int"),
    ],
)
def test_a_night_without_its_hook_writes_nothing(
    tag: Callable[..., str], fruit: Path, tmp_path: Path, function: str, line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        tag(fruit / "test.parquet", rerank__function=function, rerank__version=1)
    assert not (tmp_path / "out").exists()


def documents(tmp_path: Path) -> Path:
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(TEXTS)]
    return write(tmp_path / "documents.parquet", rows)


def night_is_reranked(folder: str, trained: Path) -> None:
    tags, rejects = read_night(folder)
    stage = tagged(trained, "InText", k=3, min_score=0.5)
    kept = [row for row in stage.to_pylist() if row["reason"] is None]
    assert tags["labels"].to_pylist() == [row["labels"] for row in kept]
    assert tags["scores"].to_pylist() == [[1.0] * len(row["labels"]) for row in kept]
    assert rejects["reason"].to_pylist() == ["text is null", "text is empty"]
    assert "text" not in tags.column_names and "text" not in rejects.column_names
    manifest = manifest_of(folder)
    assert manifest["config"]["rerank"] == {"function": "hooks:InText", "version": "1", "candidates": 50}
    assert manifest["calibrated"] is False


HOOK = {"rerank__function": "hooks:InText", "rerank__version": 1, "min_score": 0.5, "max_reject_share": 0.5}


def test_a_night_is_scored_by_its_hook(tag: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    night_is_reranked(tag(documents(tmp_path), **HOOK), trained)


def test_a_night_on_ray_is_scored_by_its_hook(
    ray_session: None, tag_with: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    night_is_reranked(tag_with(Runner(), documents(tmp_path), **HOOK), trained)


def test_another_hook_is_another_night_and_reuses_nothing(
    tag: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = documents(tmp_path)
    tag(place, **HOOK)
    for other in ({"rerank__version": 2}, {"rerank__candidates": 7}, {"rerank__function": "hooks:by_label"}):
        with pytest.raises(ConfigError, match=next(iter(other)).replace("__", ".")):
            tag(place, **HOOK | other)
    again = tag(place, **HOOK, date="2026-11-24", previous="last")
    assert manifest_of(again)["reused"] == 3
    capsys.readouterr()
    other = tag(place, **HOOK | {"rerank__version": 2}, date="2026-11-25", previous="last")
    assert "nothing is reused: the night before had another rerank.version" in capsys.readouterr().out
    assert manifest_of(other)["reused"] == 0
    without = tag(place, min_score=0.5, max_reject_share=0.5, date="2026-11-26", previous="last")
    assert "nothing is reused: the night before had another rerank" in capsys.readouterr().out
    assert manifest_of(without)["reused"] == 0


def test_a_hook_that_fails_leaves_no_tags(
    tag_with: Callable[..., str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The night goes on once the hook is mended."""
    place = documents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hooks.InText, "__call__", lambda self, pairs: hooks.not_finite(pairs))
        with pytest.raises(ModelError, match="the hook returns no scores: hooks:InText"):
            tag_with(InProcess(), place, **HOOK)
    written = [path for path in (tmp_path / "out").rglob("*.parquet") if "tags" in path.parts or "pieces" in path.parts]
    assert written == [] and not list((tmp_path / "out").rglob("_SUCCESS"))
    night_is_reranked(tag_with(InProcess(), place, **HOOK), trained)

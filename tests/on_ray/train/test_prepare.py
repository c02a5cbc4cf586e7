"""Preparation: tokens are cached under a fingerprint of what they are made of, and splits hold out what they should."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xmc_ray import command
from xmc_ray.data import token_cache
from xmc_ray.data.split import ValidationConfig
from xmc_ray.data.token_cache import Split, TokenCache
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray.session import own_errors
from xmc_ray.on_ray.train import prepare
from xmc_ray.on_ray.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("ray_session")


def prepared(fruit: Path, encoder: Path, cache: Path, *further: str) -> prepare.Prepared:
    settings = [f"--encoder.name={encoder}", f"--documents.uri={fruit}/train.parquet", "--output=unused", f"--cache={cache}"]
    return prepare.prepare(command.parse(TrainConfig, [*settings, *further]))


def test_tokens_are_made_once_and_never_taken_for_others(
    fruit: Path, tiny_encoder: Path, other_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        pytest.fail("tokenised again")

    shutil.copytree(fruit, tmp_path / "fruit")
    fruit, cache = tmp_path / "fruit", tmp_path / "cache"
    first = prepared(fruit, tiny_encoder, cache, "--groups.max_size=3")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_tokenise_all", never)
        patch.setattr(prepare, "group_labels", never)
        again = prepared(fruit, tiny_encoder, cache, "--groups.max_size=3", "--loop.epochs=3")
    assert again.tokens == first.tokens and (again.groups.group_L == first.groups.group_L).all()
    assert pa.concat_tables(again.tokens.chunks("train")).num_rows == first.counts["train"] > 200

    held_out = [row for split in ("validation", "calibration") for part in first.tokens.chunks(split) for row in part["tokens"]]
    trained = {str(row) for part in first.tokens.chunks("train") for row in part["tokens"]}
    assert held_out and not trained & {str(row) for row in held_out}

    others = [
        prepared(fruit, tiny_encoder, cache, "--validation.series=id"),
        prepared(fruit, tiny_encoder, cache, "--text.max_tokens=4"),
        prepared(fruit, other_encoder, cache),
        prepared(fruit, tiny_encoder, cache, "--validation.share=0.5"),
    ]
    (fruit / "train.parquet").write_bytes((fruit / "test.parquet").read_bytes())
    others.append(prepared(fruit, tiny_encoder, cache))
    folders = {entry.tokens.folder for entry in [first, *others]}
    assert len(folders) == 6
    assert others[-1].counts["train"] < 50
    assert max(map(len, (tokens for chunk in others[1].tokens.chunks("train") for tokens in chunk["tokens"].to_pylist()))) == 4


def test_a_series_is_held_out_as_a_whole(tiny_encoder: Path, tmp_path: Path) -> None:
    """Each document has words of its own; its label is its series, and every tenth has none."""
    numbers = range(600)
    series = [None if number % 10 == 0 else number // 20 for number in numbers]
    texts = [f"red apple {number // 25} and {number % 25} plum" for number in numbers]
    table = pa.table(
        {"id": numbers, "text": texts, "series": series, "labels": [[f"s{number // 20:02}"] for number in numbers]}
    )
    pq.write_table(table, tmp_path / "train.parquet")

    def splits(*further: str) -> dict[str, Counter[int]]:
        tokens = prepared(tmp_path, tiny_encoder, tmp_path / "cache", "--validation.share=0.5", *further).tokens
        names: tuple[Split, ...] = ("train", "validation", "calibration")
        return {name: Counter(row[0] for part in tokens.chunks(name) for row in part["labels"].to_pylist()) for name in names}

    together = splits("--validation.series=series")
    for label in range(30):
        n_of_splits = [split[label] for split in together.values()]
        assert sum(n_of_splits) == 20 and max(n_of_splits) >= 18  # two are without a series
    assert all(len([n for n in split.values() if n >= 18]) > 2 for split in together.values())
    assert max(max(split[label] for split in splits().values()) for label in range(30)) < 18


@pytest.mark.parametrize("how", ["by words", "by series", "with feedback"])
def test_documents_are_held_out_later_as_if_they_had_been_read_so(
    how: str, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"red apple {number // 25} and {number % 25} plum" for number in range(600)]
    columns = {"id": range(600), "text": words, "series": [number // 20 for number in range(600)]}
    pq.write_table(pa.table(columns | {"labels": [[f"s{number % 7}"] for number in range(600)]}), tmp_path / "train.parquet")
    rejected = [(str(number), f"s{number % 7}", "rejected") for number in range(0, 600, 5)]  # its only label
    feedback = write_feedback(tmp_path / "feedback.parquet", *rejected)
    further = {"by series": ["--validation.series=series"], "with feedback": [f"--feedback.uri={feedback}"]}.get(how, [])
    validation = ValidationConfig(share=0.3)

    def splits(tokens: TokenCache) -> list[Counter[str]]:
        return [Counter(map(str, pa.concat_tables(tokens.chunks(name)).to_pylist())) for name in get_args(Split)]

    read = prepared(tmp_path, tiny_encoder, tmp_path / "cache", "--validation.share=0.3", *further)
    whole = prepared(tmp_path, tiny_encoder, tmp_path / "cache", "--validation.share=0", *further)
    later = whole.held_out(validation, "here")
    assert (
        splits(later.tokens) == splits(read.tokens) and later.counts == read.counts and min(map(len, splits(read.tokens))) > 20
    )
    assert later.tokens.labels.labels == read.labels.labels and (later.labels.counts == read.labels.counts).all()
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_tokens", lambda *_: pytest.fail("written again"))
        assert whole.held_out(validation, "here").tokens == later.tokens
    monkeypatch.setattr(token_cache, "uses", lambda draw_D, _: np.ones(len(draw_D), np.int64))
    with pytest.raises(DataError, match="no document is left to train on: here"):
        whole.held_out(ValidationConfig(share=0.9), "here")


def test_a_file_that_arrives_meanwhile_is_not_read_under_the_older_fingerprint(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fruit/train.parquet").mkdir(parents=True)  # a folder of that name: files may arrive in it
    folder, cache = tmp_path / "fruit/train.parquet", tmp_path / "cache"
    shutil.copy(fruit / "test.parquet", folder / "first.parquet")
    fingerprint = prepare._fingerprint

    def and_a_file_arrives(*arguments: Any) -> str:
        name = fingerprint(*arguments)
        shutil.copy(fruit / "train.parquet", folder / "second.parquet")
        return name

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_fingerprint", and_a_file_arrives)
        first = prepared(tmp_path / "fruit", tiny_encoder, cache)
    assert first.labels.n_documents == pq.read_metadata(folder / "first.parquet").num_rows
    both = prepared(tmp_path / "fruit", tiny_encoder, cache)
    assert both.tokens.folder != first.tokens.folder
    assert both.labels.n_documents == first.labels.n_documents + pq.read_metadata(folder / "second.parquet").num_rows


def test_training_has_a_limit_for_rejects_and_counts_them(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Kind of fault: training took whatever was left, however little; one file that cannot be read took it down."""
    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    shutil.copyfile(fruit / "train.parquet", folder / "a.parquet")
    odd = [{"id": "null", "text": None, "labels": None}, {"id": "labels", "text": "a red plum", "labels": [1.5]}]
    pq.write_table(pa.Table.from_pylist(odd), folder / "b.parquet")
    (folder / "c.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-100])
    (folder / "d.csv").touch()
    uri = f"--documents.uri={folder}"
    told = rf"too many documents are rejected: {folder}; found 4\d\.\d%: .*at most 1"
    with own_errors(), pytest.raises(DataError, match=told):
        prepared(fruit, tiny_encoder, cache, uri)
    counts = prepared(fruit, tiny_encoder, cache, uri, "--max_reject_share=0.5").counts
    rejected = {name: count for name, count in counts.items() if name.startswith("rejected: ")}
    assert rejected == {
        "rejected: text is null": 1,
        "rejected: labels is not a list of strings or integers": 1,
        "rejected: cannot be read": 1,
    }
    assert counts["unread bytes"] == (folder / "c.parquet").stat().st_size
    with pytest.raises(DataError, match=told) as caught:  # the tokens are cached, yet the limit is that of this run
        prepared(fruit, tiny_encoder, cache, uri, "--max_reject_share=0.1")
    assert all(f"{name.removeprefix('rejected: ')} (1)" in str(caught.value) for name in rejected)


def test_label_names_are_checked_before_documents_are_read(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Kind of fault: what could be told at once is told after tokenising (sample late-names)."""
    pq.write_table(pa.table({"uri": ["red"], "title": ["Red"]}), tmp_path / "names.parquet")
    with pytest.raises(DataError, match="label names need one column 'label' and one 'name'"):
        prepared(fruit, tiny_encoder, tmp_path / "cache", "--documents.uri=/nowhere", f"--label_names={tmp_path}/names.parquet")


def test_a_label_in_a_warning_cannot_pass_for_a_line(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"d{number}", "text": f"text {number}", "labels": ["\x1b[31mred\nfinished"]} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pq.write_table(pa.table({"label": ["x"], "name": ["X"]}), tmp_path / "names.parquet")
    prepared(tmp_path, tiny_encoder, tmp_path / "cache", f"--label_names={tmp_path}/names.parquet")
    assert "names.parquet, such as \N{REPLACEMENT CHARACTER}[31mred finished\n" in capsys.readouterr().out


def write_feedback(path: Path, *verdicts: tuple[str, str, str]) -> Path:
    ids, labels, words = zip(*verdicts, strict=True)
    pq.write_table(pa.table({"id": ids, "label": labels, "verdict": words}), path)
    return path


def test_feedback_is_in_the_truth_that_is_cached(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in the counts of labels, and in what the cache is called; judged labels stand beside the others."""
    cache, rows = tmp_path / "cache", pq.read_table(fruit / "train.parquet").to_pylist()
    without = prepared(fruit, tiny_encoder, cache, "--validation.share=0")
    missing = [row["id"] for row in rows if "plum" not in row["labels"]][:7]
    emptied = rows[-1]
    verdicts = [(row["id"], "fruit", "rejected") for row in rows[:20]] + [(id, "plum", "accepted") for id in missing]
    verdicts += [(emptied["id"], label, "rejected") for label in emptied["labels"]]
    path = write_feedback(tmp_path / "feedback.parquet", *verdicts, ("gone", "plum", "accepted"))
    first = prepared(fruit, tiny_encoder, cache, "--validation.share=0", f"--feedback.uri={path}")
    said = "feedback: 7 accepted and 23 rejected labels of documents; left out: 1 of unknown documents"
    assert said in capsys.readouterr().out

    def counts(of: prepare.Prepared) -> dict[str, int]:
        return dict(zip(of.labels.labels.to_pylist(), of.labels.counts.tolist(), strict=True))

    changes = dict.fromkeys(emptied["labels"], -1)
    changes |= {"fruit": changes["fruit"] - 20, "plum": changes.get("plum", 0) + 7}
    assert counts(first) == {label: n + changes.get(label, 0) for label, n in counts(without).items()}
    table = pa.concat_tables(first.tokens.chunks("train"))
    pairs = [(set(row["judged"]) & set(row["labels"]), set(row["judged"])) for row in table.to_pylist()]
    assert len(table) == 240 and sum(len(right) for right, _ in pairs) == 7 and sum(len(said) for _, said in pairs) == 30
    assert sum(not row["labels"] for row in table.to_pylist()) == 1 and first.counts["unlabelled"] == 0
    assert "judged" not in pa.concat_tables(without.tokens.chunks("train")).column_names

    path = write_feedback(tmp_path / "again.parquet", *verdicts[::-1], ("gone", "plum", "accepted"))
    again = prepared(fruit, tiny_encoder, cache, "--validation.share=0", f"--feedback.uri={path}")
    assert again.tokens == first.tokens and again.feedback == first.feedback
    path = write_feedback(tmp_path / "other.parquet", *verdicts[1:])
    other = prepared(fruit, tiny_encoder, cache, "--validation.share=0", f"--feedback.uri={path}")
    assert len({each.tokens.folder for each in (without, first, other)}) == 3


def test_feedback_of_another_label_set_and_without_ids(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    path = write_feedback(tmp_path / "feedback.parquet", ("train-0", "Obst", "accepted"), ("train-1", "rot", "rejected"))
    with pytest.raises(
        DataError, match=r"the feedback is of another label set: .*feedback\.parquet; found 2 of 2 labels unknown"
    ):
        prepared(fruit, tiny_encoder, tmp_path / "cache", f"--feedback.uri={path}")
    with pytest.raises(
        ConfigError, match=r"feedback names documents by their ids; found documents\.id = null; set documents\.id"
    ):
        prepared(fruit, tiny_encoder, tmp_path / "cache", f"--feedback.uri={path}", "--documents.id=null")

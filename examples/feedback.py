"""Editors correct tags, and the next training learns from it: fit, predict, judge, fit again with what they have said.

python examples/feedback.py --encoder FOLDER-OR-NAME      whose tokenizer is used: the model reads words alone

The shop has labelled green fruit as red. Editors see the tags of every third document, and know better.
"""

import argparse
import itertools
import tempfile
from dataclasses import replace
from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.parquet as pq

from xmc_ray import EncoderConfig, FeedbackConfig, FitConfig, GroupsConfig, LexicalConfig, LoopConfig, XMCClassifier

COLOURS, KINDS = ("red", "green", "yellow"), ("apple", "pear", "plum", "grape")
Verdict = dict[str, str | datetime]


def catalogue() -> tuple[list[str], list[str], list[list[str]]]:
    """Ids, texts and the labels that the shop has given; that of number 0 is right."""
    offers = [*itertools.product(COLOURS, KINDS, range(15))]
    ids = [f"offer-{number}" for number in range(len(offers))]
    labels = [["red" if colour == "green" and number else colour, kind] for colour, kind, number in offers]
    return ids, [f"a {colour} {kind}, lot {number}" for colour, kind, number in offers], labels


def judged(id: str, text: str, tags: list[str]) -> list[Verdict]:
    """What an editor says of a document: which of its tags are right, and what is missing."""
    right = {word.strip(",") for word in text.split()} & {*COLOURS, *KINDS}
    said = {tag: "accepted" if tag in right else "rejected" for tag in tags} | dict.fromkeys(right, "accepted")
    now = datetime.now(timezone.utc)
    return [{"id": id, "label": label, "verdict": verdict, "editor": "me", "at": now} for label, verdict in said.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="bert-base-uncased")
    arguments = parser.parse_args()
    ids, texts, labels = catalogue()
    config = FitConfig(
        encoder=EncoderConfig(name=arguments.encoder, layers=0),
        lexical=LexicalConfig(width=16, columns=4096),
        groups=GroupsConfig(max_size=1),
        loop=LoopConfig(epochs=10, batch_size=8),
    )
    classifier = XMCClassifier.fit(texts, labels, config=config)
    show("before", classifier)

    tags = [[label for label, _ in best] for best in classifier.predict(texts, k=2)]
    verdicts = [row for number in range(0, len(ids), 3) for row in judged(ids[number], texts[number], tags[number])]
    print(f"{len(verdicts)} verdicts, {sum(row['verdict'] == 'rejected' for row in verdicts)} of them: rejected")
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(verdicts), f"{folder}/feedback.parquet")
        feedback = FeedbackConfig(uri=f"{folder}/feedback.parquet")
        show("after", XMCClassifier.fit(texts, labels, ids=ids, config=replace(config, feedback=feedback)))


def show(when: str, classifier: XMCClassifier) -> None:
    scores = dict(classifier.predict(["a green pear, lot 99"], k=7)[0])
    print(f"{when}: green {scores['green']:.3f}, red {scores['red']:.3f}")


if __name__ == "__main__":
    main()

"""A title that counts more than the description: fit on fields, predict, and explain which word of which field did it.

python examples/fields.py --encoder FOLDER-OR-NAME      whose tokenizer is used: the model reads words alone
"""

import argparse
import itertools

from xmc_ray import EncoderConfig, FitConfig, GroupsConfig, LexicalConfig, LoopConfig, TextConfig, XMCClassifier

COLOURS, KINDS = ("red", "green", "yellow"), ("apple", "pear", "plum", "grape")


def catalogue() -> tuple[dict[str, list[str]], list[list[str]]]:
    """Titles that say what is offered, and bodies that say what goes with it: columns as of a table, and the labels."""
    offers = [*itertools.product(COLOURS, KINDS, COLOURS, KINDS)]
    titles = [f"{colour} {kind}" for colour, kind, _, _ in offers]
    bodies = [f"goes with a {colour} {kind}" for _, _, colour, kind in offers]
    return {"title": titles, "body": bodies}, [[colour, kind] for colour, kind, _, _ in offers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="bert-base-uncased")
    arguments = parser.parse_args()
    texts, labels = catalogue()
    config = FitConfig(
        encoder=EncoderConfig(name=arguments.encoder, layers=0),
        text=TextConfig(fields={"title": 3.0, "body": 0.5}, first={"body": 20}),
        lexical=LexicalConfig(width=16, columns=4096),
        groups=GroupsConfig(max_size=1),
        loop=LoopConfig(epochs=10, batch_size=8),
    )
    classifier = XMCClassifier.fit(texts, labels, config=config)
    offer = {"title": "a red plum", "body": "goes with a green pear"}
    for label, score in classifier.predict([offer], k=2)[0]:
        print(f"{label}: {score:.3f}")
    print(classifier.explain(offer, "plum"))


if __name__ == "__main__":
    main()

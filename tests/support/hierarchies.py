"""Hierarchies as dictionaries, a label's parents each, and their tags by plain loops: the slow twin of `data.tag_hierarchy`."""

from hypothesis import strategies as st

LABELS = [f"l{n}" for n in range(9)]
Tag = tuple[str, float]


@st.composite
def hierarchies(draw: st.DrawFn) -> dict[str, list[str]]:
    """Parents come later in a shuffled list of labels; not all labels have a row."""
    order = draw(st.permutations(LABELS))
    rows = {label: draw(st.lists(st.sampled_from(order[place + 1 :]), max_size=3)) for place, label in enumerate(order[:-1])}
    return {label: parents for label, parents in rows.items() if draw(st.booleans())} or {order[0]: [order[1]]}


def above(label: str, parents: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    for parent in parents.get(label, []):
        found |= {parent, *above(parent, parents)}
    return found


def level(label: str, parents: dict[str, list[str]]) -> int:
    return max((1 + level(parent, parents) for parent in parents.get(label, [])), default=0)


def narrowest(tags: list[Tag], parents: dict[str, list[str]]) -> list[Tag]:
    return [tag for tag in tags if not any(tag[0] in above(other, parents) for other, _ in tags)]


def limited(tags: list[Tag], parents: dict[str, list[str]], n: int, branch_level: int) -> list[Tag]:
    """Those not above others that are among the n best of each of their branches, and the tags above them."""
    counts: dict[str, int] = {}
    kept: list[Tag] = []
    for tag in narrowest(tags, parents):
        branches = [label for label in above(tag[0], parents) if level(label, parents) == branch_level]
        if all(counts.get(branch, 0) < n for branch in branches):
            kept.append(tag)
        for branch in branches:
            counts[branch] = counts.get(branch, 0) + 1
    return [tag for tag in tags if tag in kept or any(tag[0] in above(other, parents) for other, _ in kept)]


def closed(tags: list[Tag], parents: dict[str, list[str]]) -> dict[str, float]:
    scores = dict(tags)
    for label, score in tags:
        for ancestor in above(label, parents):
            scores[ancestor] = max(scores.get(ancestor, 0), score)
    return scores

"""How well every peer and our recipes tag: all of them on the same splits, scored by the same code.

Peers (peers/) get TF-IDF of words and word pairs, XR-Transformer the text as well; each runs in a virtual environment of its
own, made on first use, with two threads. Ours are the recipes jobs/configs/quality-<set>*.toml, or small-cpu.toml if a set has
none, once per seed; several models also give a row for their ensemble, which trains nothing. Runs are sequential, each in its
own process, the quickest method first. Predictions are kept below ``--results``; the row goes to a record beside the tables,
with a digest of its inputs. A run that finished, or exceeded ``--minutes``, is not repeated while its inputs are unchanged,
unless ``--again`` is given or an ensemble lacks its model; a failed run is.

All predictions are scored by `xmc_ray.metrics`, with the frequencies of the whole training split; true labels that it lacks are
left out. Seconds depend on what else the machine does; CPU s, of all processes in training and prediction, hardly do (an
ensemble's hold its members' own predictions as well).

``--fresh`` does not use the test split, on which recipes may have been chosen: nine tenths of the training split train and the
rest tests, without documents that begin like one of the nine tenths. (results/variants.md lists what was chosen there.) Its
rows are of one machine, and ours of one state of the library: a row of another one is not valid.

The tables in ``--output`` are rewritten after every run: all rows of the record that are still valid, ours beside the best peer
of each figure, and of which machines and states of the library the rows are. "Ours" is the ensemble of all our models, as most
peers are three trees; where there is none, the one with the best P@1. Bar: ahead of every peer in P@1, P@3, P@5 and PSP@5 on
every data set, trained within an hour, and no run that failed or is missing; a peer may have taken too long.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.inputs import minilm
from benchmarks.quality._quality import ROOT, Method, peers
from benchmarks.quality._record import Benchmark, options, read
from benchmarks.quality._tables import OURS

SETS = ("tate", "debian-tags", "debian-deps")
FEW_LABELS = ("debian-tags",)
SEEDS = {"quality-tate": (6088, 6089, 6090), "quality-debian-tags-joint": (6088, 6089)}  # of a recipe; the others' is the first
CONFIGS, RECIPES = ROOT / "jobs" / "configs", ROOT / "xmc_ray" / "recipes"


def recipes(set_: str, seeds: Sequence[int] | None, settings: list[str]) -> list[Method]:
    """Our methods for a data set: each recipe with each seed (None: its own), and all of them together if there are several."""
    script, named = Path(__file__).with_name("_recipe.py"), f"quality-{set_}"
    files = sorted(CONFIGS.glob(f"{named}*.toml"), key=lambda file: file.stem) or [RECIPES / "small-cpu.toml"]
    single = [
        Method(
            f"{OURS}-{file.stem.removeprefix(f'{named}-').replace(named, 'recipe')}-{seed}",
            script,
            (f"--config={file.relative_to(ROOT)}", f"--seed={seed}", *settings),
        )
        for file in files
        for seed in seeds or SEEDS.get(file.stem, (6088,))
    ]
    names = tuple(method.name for method in single)
    together = Method(f"{OURS}-ensemble-x{len(names)}", script, ("--members", *names), members=names)
    return [*single, together] if len(names) > 1 else single


def methods(set_: str, seeds: Sequence[int] | None, settings: list[str]) -> list[Method]:
    """All methods for a data set, the quickest first; a machine a label only where there are hundreds of labels."""
    first, *others = [peer for peer in peers(minilm()) if set_ in FEW_LABELS or "svc" not in peer.name]
    return [first, *recipes(set_, seeds, settings), *others]


def main() -> None:
    parser = options(__doc__, "quality")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of data sets in it")
    parser.add_argument("--seeds", type=int, nargs="+", help="of each of our recipes, each of them a row; those in this file")
    parser.add_argument("--minutes", type=float, default=90.0, help="a run that takes longer is ended")
    given, settings = parser.parse_known_args()
    same = ("library", "machine") if given.fresh else ()
    benchmark = Benchmark(name="quality", given=given, minutes=given.minutes, same=same)
    folders = {set_: benchmark.folder(set_, given.data / set_) for set_ in given.sets}
    known = {set_: methods(set_, given.seeds, settings) for set_ in folders}
    benchmark.measure(folders, known, read(benchmark.record("quality")))


if __name__ == "__main__":
    main()

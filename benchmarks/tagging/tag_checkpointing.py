"""What exactly-once costs: a whole night against its own stages without any writes, on tate's documents in S3.

`on`: the library's night: planned, pieces written one by one, merged, published. `off`: the same pieces (planned beforehand,
uncounted) are read, tokenised, tagged and turned into labels and scores by the same tasks and actor, and then only counted:
nothing is written. So the difference is the plan and every write, even those that any job needs.

Start-up is excluded: one warm Ray for all turns, and clocks that start when the first piece reaches the model. What is read by
then counts with its CPU seconds divided by the cores, and so does the plan of `on`. The two take turns.

The model: MiniLM with all its layers (unless told) and tate's labels, heads untrained. Bar: 5 %.
"""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import pyarrow as pa

from benchmarks.frame import verdict
from benchmarks.tagging._tagging import (
    Diary,
    Timed,
    TimedPredictor,
    TimedRead,
    diary,
    documents_of,
    label_lists,
    make_bundle,
    options,
    own_ray,
    s3_server,
    spread,
    tag_config,
    tagger,
    told,
    write_documents,
)
from xmc_ray.bundle.members import Members
from xmc_ray.data.documents import Rules
from xmc_ray.data.inputs import list_inputs
from xmc_ray.on_ray.tag import job
from xmc_ray.on_ray.tag.config import TagConfig
from xmc_ray.on_ray.tag.pieces import TagColumns
from xmc_ray.on_ray.tag.plan import Plan
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.on_ray.tag.scan import scan

BAR, WARM = 0.05, 2_000


@dataclass(frozen=True)
class CountPieces:
    """In the place of `PieceWriter`: makes the columns of the tags and counts them."""

    columns: TagColumns

    def __call__(self, number: int, table: pa.Table) -> dict[str, int]:
        return {"rows": len(self.columns(table)[0])}


def plan_of(config: TagConfig) -> Plan:
    pieces = job._PIECES_AN_ACTOR * config.pool.max
    rules = Rules.of(config.documents, labelled=False)
    files = list_inputs(config.documents).files
    return scan(files, rules, [], config.commit_rows // 2, pieces, config.max_reject_share, Runner())


def off(book: Diary, config: TagConfig, plan: Plan) -> Timed:
    """The stages of `tagging` without anything that is kept."""
    members = Members.read(config.bundle)
    labels, tokenizers = members.fetch()
    columns = TagColumns(labels, members.fingerprint, config.min_score)
    began = time.time()
    read = TimedRead(Rules.of(config.documents, labelled=False), tokenizers)
    predictor = partial(TimedPredictor, members, config.k, config.pool, config.model)
    groups = plan.tasks(())
    rows = sum(piece["rows"] for piece in Runner().run_pieces(groups, read, predictor, CountPieces(columns), config.pool))
    assert rows == plan.rows, f"{rows} of {plan.rows} rows"
    return Timed("", began, time.time(), book.since(began))


def main() -> None:
    arguments = options(__doc__, documents=16_384, rounds=3)
    documents = documents_of(arguments.data, arguments.documents)
    with tempfile.TemporaryDirectory() as folder, diary() as book, s3_server() as bucket, own_ray():
        arguments.pool = arguments.pool.settled()
        bundle = make_bundle(Path(folder) / "bundle", tagger(arguments.layers), label_lists(arguments.data))
        few = write_documents(f"{bucket}/few", documents.slice(0, WARM))
        book.night(tag_config(few, bundle, f"{bucket}/warm", pool=arguments.pool))
        source = write_documents(f"{bucket}/documents", documents, files=4)
        print(told(arguments))
        print(f"{'off s':>8}{'on s':>8}{'more':>8}{'scan s':>10}{'write s':>9}{'publish s':>11}")
        configs = [
            tag_config(source, bundle, f"{bucket}/night-{turn}", pool=arguments.pool) for turn in range(arguments.rounds)
        ]
        plan, turns = plan_of(configs[0]), []
        for config in configs:
            without, night = off(book, config, plan), book.night(config)
            turns.append((without.seconds, night.seconds + night.total("scan")))
            print(
                f"{turns[-1][0]:8.1f}{turns[-1][1]:8.1f}{turns[-1][1] / turns[-1][0] - 1:8.1%}"
                f"{night.total('scan'):10.1f}{night.total('write'):9.1f}{night.total('publish'):11.1f}",
                flush=True,
            )
    print(f"off {spread([len(documents) / each for each, _ in turns], 0)} documents/s")
    print(f"on  {spread([len(documents) / each for _, each in turns], 0)} documents/s")
    more = median(with_all / without_all - 1 for without_all, with_all in turns)
    verdict("tag-checkpointing", f"{more:.1%}", f"{BAR:.0%}", more <= BAR)


if __name__ == "__main__":
    main()

"""Tag a catalogue: documents and a bundle in, Parquet with labels and scores out.

python jobs/tag.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.command import parse
    from xmc_ray.on_ray.tag.job import TagConfig, tag

    tag(parse(TagConfig))


if __name__ == "__main__":
    run_and_exit(main)

"""Tag a catalogue: documents and a bundle in, Parquet with labels and scores out.

python jobs/tag.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("tag")

"""Tag a catalogue: documents and a bundle in, Parquet with labels and scores out.

python jobs/tag.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.command import run
from xmc_ray.on_ray.tag.job import TagConfig, tag

if __name__ == "__main__":
    raise SystemExit(run(tag, TagConfig))

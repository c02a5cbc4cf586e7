"""Train a model: documents with labels in, a bundle out.

python jobs/train.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.command import run
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.job import run as train

if __name__ == "__main__":
    raise SystemExit(run(train, TrainConfig))

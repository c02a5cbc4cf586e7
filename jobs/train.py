"""Train a model: documents with labels in, a bundle out.

python jobs/train.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.command import parse
    from xmc_ray.on_ray.train.config import TrainConfig
    from xmc_ray.on_ray.train.job import run

    run(parse(TrainConfig))


if __name__ == "__main__":
    run_and_exit(main)

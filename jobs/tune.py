"""Choose a recipe by trials and train it: documents with labels and minutes in, a bundle out.

python jobs/tune.py --documents.uri FILE --encoder FOLDER --output FOLDER --minutes 20        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.command import parse
    from xmc_ray.on_ray.train.tune import TuneConfig, run

    run(parse(TuneConfig))


if __name__ == "__main__":
    run_and_exit(main)

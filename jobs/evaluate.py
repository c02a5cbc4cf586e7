"""Evaluate a bundle: documents with labels in, metrics out.

python jobs/evaluate.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.command import parse
    from xmc_ray.on_ray.evaluate import EvaluateConfig, evaluate

    evaluate(parse(EvaluateConfig))


if __name__ == "__main__":
    run_and_exit(main)

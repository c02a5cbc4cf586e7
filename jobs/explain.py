"""Explain a tag: a bundle, a text and a label in, the words that carried it out.

python jobs/explain.py --bundle FOLDER --text "..." --label LABEL        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.bundle.explain import ExplainConfig, print_explanation
    from xmc_ray.command import parse

    print_explanation(parse(ExplainConfig))


if __name__ == "__main__":
    run_and_exit(main)

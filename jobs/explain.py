"""Explain a tag: a bundle, a text and a label in, the words that carried it out.

python jobs/explain.py --bundle FOLDER --text "..." --label LABEL        --help lists every setting
"""

from xmc_ray.bundle.explain import ExplainConfig, print_explanation
from xmc_ray.command import run

if __name__ == "__main__":
    raise SystemExit(run(print_explanation, ExplainConfig))

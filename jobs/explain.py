"""Explain a tag: a bundle, a text and a label in, the words that carried it out.

python jobs/explain.py --bundle FOLDER --text "..." --label LABEL        --help lists every setting
"""

from xmc_ray.command import run
from xmc_ray.explanation import ExplainConfig
from xmc_ray.explanation import run as explain

if __name__ == "__main__":
    raise SystemExit(run(explain, ExplainConfig))

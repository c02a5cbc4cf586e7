"""Evaluate a bundle: documents with labels in, metrics out.

python jobs/evaluate.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.command import run
from xmc_ray.on_ray.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    raise SystemExit(run(evaluate, EvaluateConfig))

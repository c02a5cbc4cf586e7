"""Evaluate a bundle: documents with labels in, metrics out.

python jobs/evaluate.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("evaluate")

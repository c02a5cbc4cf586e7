"""Train a model: documents with labels in, a bundle out.

python jobs/train.py --config my.toml [--section.setting value ...]        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("train")

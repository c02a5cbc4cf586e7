"""Explain a tag: a bundle, a text and a label in, the words that carried it out.

python jobs/explain.py --bundle FOLDER --text "..." --label LABEL        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("explain")

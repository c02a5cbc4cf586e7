"""Extend a bundle: a bundle and documents of new labels in, a bundle that knows them out, without training.

python jobs/extend.py --bundle FOLDER --documents.uri FILE --output FOLDER        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("extend")

"""Choose a recipe by trials and train it: documents with labels and minutes in, a bundle out.

python jobs/tune.py --documents.uri FILE --encoder FOLDER --output FOLDER --minutes 20        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("tune")

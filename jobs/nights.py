"""Look after the nights of an output: list them, name the latest one, remove old ones, show how right their tags are.

python jobs/nights.py list --output FOLDER
python jobs/nights.py remove --output FOLDER --keep 30        says what would go; --yes removes it; --help lists every setting
python jobs/nights.py feedback --output FOLDER --feedback FILE.parquet        what editors have said of tags
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("nights")

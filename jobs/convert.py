"""Convert a public benchmark: its own files in, Parquet documents out.

python jobs/convert.py --layout lines [--setting value ...]        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("convert")

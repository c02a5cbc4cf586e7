"""Convert a public benchmark: its own files in, Parquet documents out.

python jobs/convert.py --layout lines [--setting value ...]        --help lists every setting
"""

from xmc_ray.command import run
from xmc_ray.data.convert import ConvertConfig
from xmc_ray.data.convert import run as convert

if __name__ == "__main__":
    raise SystemExit(run(convert, ConvertConfig))

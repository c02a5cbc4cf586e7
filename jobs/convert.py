"""Convert a public benchmark: its own files in, Parquet documents out.

python jobs/convert.py --layout lines [--setting value ...]        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.command import parse
    from xmc_ray.data.convert import ConvertConfig, run

    run(parse(ConvertConfig))


if __name__ == "__main__":
    run_and_exit(main)

"""Tags as one step of a pipeline on Ray Data: documents from anywhere in, Parquet out.

    python examples/stage.py --documents examples/hpo/data/test.parquet --bundle runs/demo/hpo/train/bundle --output runs/tagged

Any Dataset will do in place of the one that is read here: `ray.data.from_huggingface(...)`, `ray.data.read_iceberg(...)`,
`ray.data.read_json(...)`, or what another step has made.
"""

import argparse

import ray.data

from xmc_ray import PoolConfig, tag_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", required=True, help="Parquet files")
    parser.add_argument("--bundle", required=True, help="folder of a trained model, local or s3://")
    parser.add_argument("--output", required=True, help="folder for Parquet files")
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--actors", type=int, default=1, help="at most")
    parser.add_argument("--gpu", action="store_true", help="give each actor one")
    arguments = parser.parse_args()

    documents = ray.data.read_parquet(arguments.documents)
    pool = PoolConfig(max=arguments.actors, gpu=arguments.gpu)
    tagged = tag_dataset(documents, arguments.bundle, text=arguments.text, k=5, prefix="predicted_", pool=pool)
    tagged.write_parquet(arguments.output)


if __name__ == "__main__":
    main()

"""Extend a bundle: a bundle and documents of new labels in, a bundle that knows them out, without training.

python jobs/extend.py --bundle FOLDER --documents.uri FILE --output FOLDER        --help lists every setting
"""

from xmc_ray.exits import run_and_exit


def main() -> None:
    """The job."""
    from xmc_ray.bundle.extend import ExtendConfig, extend_bundle
    from xmc_ray.command import parse

    extend_bundle(parse(ExtendConfig))


if __name__ == "__main__":
    run_and_exit(main)

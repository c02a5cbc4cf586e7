"""The image without a container engine: runs the steps of cluster/Dockerfile in a fresh virtual environment.

    python cluster/image.py FOLDER [NAME=VALUE ...]      build arguments, such as PIP_EXTRA_INDEX_URL=

The steps are read from the Dockerfile. Its paths are below FOLDER, and the virtual environment replaces the image's own Python.
Steps for root, marked by a comment that begins with ``system:``, are skipped, as are FROM and USER. At the end the first python
on the PATH must be the one with Ray, torch and xmc_ray, and every job must accept its options.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from dockerfile_parse import DockerfileParser

PROJECT = Path(__file__).parent.parent
DOCKERFILE = Path(__file__).parent / "Dockerfile"


def steps(dockerfile: Path = DOCKERFILE) -> Iterator[tuple[str, str]]:
    """Instructions and their values, without comments; a RUN marked with ``system:`` is returned as SYSTEM."""
    marked = False
    for step in DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()), env_replace=False).structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "COMMENT":
            marked |= value.startswith("system:")
            continue
        yield ("SYSTEM" if marked and instruction == "RUN" else instruction), value
        marked = False


def build(folder: Path, arguments: dict[str, str], dockerfile: Path = DOCKERFILE, project: Path = PROJECT) -> dict[str, str]:
    """Run the steps below an empty ``folder`` and return the image's environment. Raises if a step fails or is unknown."""
    python = folder / "usr" / "local"
    venv.create(python, with_pip=True)
    here, image = folder, os.environ | {"PATH": f"{python / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    image.pop("PYTHONPATH", None)  # only what the steps have installed may be found
    during: dict[str, str] = {}  # build arguments: set during the build, not in the image
    for instruction, value in steps(dockerfile):
        print(f"{instruction} {' '.join(value.split())}", flush=True)
        words = shlex.split(value)
        if instruction == "ARG":
            name, _, default = value.partition("=")
            during[name] = arguments.get(name, default)
        elif instruction == "ENV":
            image |= dict(word.split("=", 1) for word in words)
        elif instruction == "WORKDIR":
            here = below(folder, here, value)
            here.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            copy([project / source for source in words[:-1]], below(folder, here, words[-1]), into=words[-1].endswith("/"))
        elif instruction == "RUN":
            subprocess.run(["bash", "-euc", value], cwd=here, env=image | during, check=True)
        elif instruction not in {"FROM", "USER", "SYSTEM"}:
            raise SystemExit(f"error: {dockerfile}: {instruction} is not known here")
    return image | {"PWD": str(here)}


def below(folder: Path, here: Path, path: str) -> Path:
    """A path of the image as one below ``folder``; a relative one begins at ``here``."""
    return folder / path.lstrip("/") if path.startswith("/") else here / path


def copy(sources: list[Path], target: Path, into: bool) -> None:
    """Like COPY: files go into ``target`` or become it; of a folder, only its contents are copied."""
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (target if into else target.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def check(image: dict[str, str]) -> None:
    """Raises unless the first python on the PATH has everything and the jobs are where the manifests look for them."""
    here = Path(image["PWD"])
    for command in (
        ["python", "-c", "import sys, ray, torch, xmc_ray; print(sys.prefix, ray.__version__, torch.__version__)"],
        *(["python", str(job.relative_to(here)), "--help"] for job in sorted(here.glob("jobs/*.py"))),
    ):
        print(f"check {shlex.join(command)}", flush=True)
        # Through a shell, which looks for python in the image's PATH and not in that of this process.
        done = subprocess.run(["bash", "-c", shlex.join(command)], cwd=here, env=image, stdout=subprocess.PIPE, text=True)
        if done.returncode or not done.stdout:
            raise SystemExit(f"error: {shlex.join(command)} ended with {done.returncode}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or any("=" not in word for word in sys.argv[2:]):
        raise SystemExit("error: python cluster/image.py FOLDER [NAME=VALUE ...]")
    target = Path(sys.argv[1]).resolve()
    if target.exists():
        raise SystemExit(f"error: {target} exists; give a new folder")
    check(build(target, dict(word.split("=", 1) for word in sys.argv[2:])))

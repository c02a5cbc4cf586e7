"""The command ``xmc-ray``, which has every job by its name.

    xmc-ray tag --config my.toml [--section.setting value ...]

``jobs/*.py`` are the same jobs as files, for `ray job submit`.
"""

import difflib
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, NoReturn

from xmc_ray.errors import ConfigError
from xmc_ray.exits import run_and_exit
from xmc_ray.settings import Settings
from xmc_ray.usage import completion


class Job(NamedTuple):
    """What a job does, and the places, ``module:name``, of its settings and its function."""

    about: str
    config: str
    function: str


JOBS = {
    "tune": Job(
        "try a few recipes for some minutes and train the best", "on_ray.train.tune:TuneConfig", "on_ray.train.tune:run"
    ),
    "train": Job(
        "train a model: documents with labels in, a bundle out", "on_ray.train.config:TrainConfig", "on_ray.train.job:run"
    ),
    "evaluate": Job("measure a bundle on documents with labels", "on_ray.evaluate:EvaluateConfig", "on_ray.evaluate:evaluate"),
    "tag": Job("tag a catalogue, one night's work", "on_ray.tag.config:TagConfig", "on_ray.tag.job:tag"),
    "nights": Job(
        "list nights, name the latest, remove old ones, show feedback",
        "on_ray.tag.retention:NightsConfig",
        "on_ray.tag.retention:run",
    ),
    "show": Job("look at runs and nights in a browser", "show.server:ShowConfig", "show.server:serve"),
    "explain": Job("show which words carried a tag", "bundle.explain:ExplainConfig", "bundle.explain:print_explanation"),
    "extend": Job("add labels to a bundle without training", "bundle.extend:ExtendConfig", "bundle.extend:extend_bundle"),
    "convert": Job("turn the files of a public benchmark into Parquet", "data.convert:ConvertConfig", "data.convert:run"),
    "doctor": Job("look at this machine: what is there, what will be slow", "doctor:DoctorConfig", "doctor:examine"),
    "completion": Job("print a script that completes all this in bash or zsh", "cli:CompletionConfig", "cli:print_completion"),
}


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Settings):
    """Print a script that makes a shell complete jobs and settings: source <(xmc-ray completion --shell bash)"""

    shell: Literal["bash", "zsh"] = "bash"
    """The shell."""


def print_completion(config: CompletionConfig) -> None:
    """The job ``xmc-ray completion``."""
    from xmc_ray.command import options

    commands = {name: (job.about, options(named(job.config))) for name, job in JOBS.items()}
    print(completion("xmc-ray", commands, config.shell))


def main() -> NoReturn:
    """The command, with the process's arguments."""
    name, *rest = sys.argv[1:] or ["--help"]
    sys.argv = [f"xmc-ray {name}", *rest]  # what the job's own --help calls it
    if name in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    run(name)


def run(name: str) -> NoReturn:
    """Run the job of that name with the process's arguments, and end the process (see `exits`)."""
    run_and_exit(lambda: _run(name))


def _run(name: str) -> None:
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, 1)
        raise ConfigError("no such job", found=name, expected=", ".join(JOBS), way_out=f"perhaps {near[0]}" if near else None)
    from xmc_ray.command import parse

    config = parse(named(JOBS[name].config))  # a wrong setting is told before the job's own modules are loaded
    named(JOBS[name].function)(config)


def named(place: str) -> Any:
    """What lies at a place of `JOBS`."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"xmc_ray.{module}"), name)


def _overview() -> str:
    jobs = "\n".join(f"  {name:<10} {job.about}" for name, job in JOBS.items())
    return f"usage: xmc-ray JOB [--config FILE] [--setting value ...]\n\n{jobs}\n\nxmc-ray JOB --help lists a job's settings"

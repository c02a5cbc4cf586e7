"""The command ``xmc-ray``: the same jobs as the files in jobs/."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from checkout import ROOT

from xmc_ray.cli import JOBS
from xmc_ray.settings import Settings


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from xmc_ray.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_settings_and_a_function(name: str) -> None:
    config, function = (place.partition(":") for place in JOBS[name][1:])
    assert issubclass(getattr(import_module(f"xmc_ray.{config[0]}"), config[2]), Settings)
    assert callable(getattr(import_module(f"xmc_ray.{function[0]}"), function[2]))


def test_the_files_are_the_same_jobs() -> None:
    files = {path.stem: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    assert set(JOBS) - {"doctor", "completion"} == set(files)
    assert all(f'run("{name}")\n' in text for name, text in files.items())


def test_without_a_job_it_lists_them() -> None:
    for arguments in ([], ["--help"]):
        done = call(*arguments)
        assert (done.returncode, done.stderr) == (0, "") and all(f"\n  {name} " in done.stdout for name in JOBS)


def test_an_unknown_job_is_one_line() -> None:
    done = call("tga", "--k", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such job; found tga; expected tune, train, ") and done.stderr.endswith(
        "perhaps tag\n"
    )


def test_a_job_gets_its_arguments_and_its_name() -> None:
    done = call("nights", "list", "--output", "/nowhere")
    assert (done.returncode, done.stdout) == (0, "no nights: /nowhere\n")
    assert call("convert", "--help").stdout.startswith("usage: xmc-ray convert [--config FILE] [--setting value ...]\n")


def test_bash_completes_jobs_settings_and_values(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    done = call("completion")
    assert (done.returncode, done.stderr) == (0, "")
    script.write_text(done.stdout)

    def completed(*words: str) -> set[str]:
        line = f"source {script}; COMP_WORDS=(xmc-ray {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_xmc_ray"
        shown = subprocess.run(
            ["bash", "-c", f'{line} 2>/dev/null; printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True
        )
        return set(shown.stdout.split())

    assert completed("t") == {"train", "tune", "tag"}
    assert completed("tag", "--hierarchy.") >= {"--hierarchy.table", "--hierarchy.close"}
    assert completed("train", "--encoder.pooling", "'m'") == {"mean"}

"""The server: a port of this machine alone, and what keeps it from starting."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from checkout import ROOT
from made_nights import write_run

from xmc_ray.errors import ConfigError, DataError
from xmc_ray.show.server import ShowConfig, listening, serve


def test_it_listens_on_this_machine_alone_on_a_port_of_its_own() -> None:
    with listening(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1" and port > 0
        listener.listen()
        with pytest.raises(ConfigError, match=rf"the port is not free: {port}; found \w.*; choose another"):
            listening(port)


def test_a_folder_without_anything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to show"):
        serve(ShowConfig(folder=str(tmp_path / "nowhere")))


def test_the_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"not installed; found uvicorn; pip install 'xmc_ray\[show\]'"):
        serve(ShowConfig(folder=str(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_its_address_answers_and_ends_by_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    """As it says itself: that is no error."""
    pytest.importorskip("uvicorn", reason="the extra `show` is not installed")
    write_run(tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs" / "show.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address) as answer:
                assert b"1 training run" in answer.read()
            server.send_signal(number)
            _, told = server.communicate()
        finally:
            server.kill()
    assert (server.returncode, told) == (0, "")

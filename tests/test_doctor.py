"""What ``xmc-ray doctor`` says of a machine."""

import shutil
from types import SimpleNamespace

import pytest

from xmc_ray import doctor
from xmc_ray.doctor import DoctorConfig, examine, findings


def found(name: str) -> doctor.Finding:
    (finding,) = (finding for finding in findings() if finding.name == name)
    return finding


def test_everything_is_said_once_and_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    examine(DoctorConfig())
    said = capsys.readouterr().out
    assert "the-" not in said and "127.0.0.1:8333, keys of the environment" in said
    assert [said.count(f"\n{name} ") for name in ("cores", "memory", "GPUs", "bfloat16", "/dev/shm", "S3", "Ray")] == [1] * 7
    assert "torch 2." in said.splitlines()[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somebody:the-password@127.0.0.1:8333")
    examine(DoctorConfig())
    said = capsys.readouterr().out
    assert "the-" not in said and "an S3 endpoint has no user and no password in it" in said


def test_what_is_short_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 28))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    assert (
        "--shm-size" in found("/dev/shm").advice
        and "make room" in found("this folder").advice
        and "TMPDIR" in found("temporary files").advice
    )
    assert "go together" in found("S3").advice
    examine(DoctorConfig())
    said = capsys.readouterr().out
    assert "0.2 GiB free  *" in said and "\n* this folder: below 10.0 GiB" in said


def test_a_good_machine_has_nothing_to_mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "findings", lambda: iter([doctor.Finding("cores", "8")]))
    examine(DoctorConfig())
    assert capsys.readouterr().out == "cores  8\n\nnothing to mend\n"

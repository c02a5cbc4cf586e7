"""What depends on the device, and all that computes on one: on a device of the tests that stands for an accelerator."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xmc_ray.model.device import KnownMask, download, upload

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.timeout(1800)  # it builds the device first
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which builds the device of the tests")
def test_all_that_computes_runs_on_an_accelerator_without_needless_waits() -> None:
    """The tests of `support/on_mimic.py`, in a process of their own: the device is one for the whole process."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--durations=5"]
    done = subprocess.run([*command, "tests/support/on_mimic.py"], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_nothing_is_copied_on_a_cpu() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, CPU) is tensor
    assert download(tensor)[0] is tensor


def test_several_tensors_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a device: on "meta" there would be no numbers."""
    score_Bk, label_Bk = torch.tensor([[0.1, -torch.inf]]), torch.tensor([[2**40, -1], [3, 4]])
    copies: list[Tensor] = []

    class Elsewhere(Tensor):
        """A tensor that says it is on a device."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

        def cpu(self) -> Tensor:  # type: ignore[override]
            copies.append(self)
            return self.as_subclass(Tensor)

    score, label = download(score_Bk.as_subclass(Elsewhere), label_Bk.as_subclass(Elsewhere))
    assert len(copies) == 1
    assert torch.equal(score.as_subclass(Tensor), score_Bk) and torch.equal(label.as_subclass(Tensor), label_Bk)


@pytest.mark.parametrize("is_full", [True, False])
def test_the_host_knows_whether_a_mask_is_all_true(is_full: bool) -> None:
    mask_BT = torch.tensor([[True, True, True], [True, True, is_full]])
    with KnownMask(mask_BT):
        assert bool((mask_BT.long() > 0).all()) is is_full
        assert bool(mask_BT[:, :2].all())
        assert not bool(torch.zeros(5, dtype=torch.bool).all())

"""What a night adds up to, and what it says meanwhile."""

import time

import pyarrow as pa
import pytest

from xmc_ray.on_ray.tag.totals import Account, progress


def test_a_night_says_how_far_it_is_though_no_piece_ends(capsys: pytest.CaptureFixture[str]) -> None:
    account = Account(pa.table({"label": ["red"], "name": [None], "count": [1]}))
    with progress(account, 200, every=0.05):
        time.sleep(0.3)
        account.counts.update(tagged=90, rejected=10)
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    assert lines[0] == "0 of 200 documents (0%), 0/s, no piece done yet, 0 rejected"
    assert lines[-1].startswith("100 of 200 documents (50%), ") and lines[-1].endswith(" left, 10 rejected")
    time.sleep(0.2)
    assert capsys.readouterr().out == "", "it is over"

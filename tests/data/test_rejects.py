"""Kind of fault: training had no limit for rejects, and one file that cannot be read took the whole job down."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.reader import read_rows
from xmc_ray.data.rejects import Rejects
from xmc_ray.errors import DataError


def test_rows_and_lost_bytes_count_whichever_is_more() -> None:
    rejects = Rejects(1000)
    assert rejects.share == Rejects(0).share == 0
    rejects.add(pa.array([None] * 7 + ["a"] * 2 + ["b"]))
    assert rejects.share == 0.3 and str(rejects) == "a (2), b (1)"
    rejects.check(0.3, where="here", way_out="none")
    rejects.add(pa.chunked_array([pa.array(["cannot be read"])]), lost_bytes=500)
    told = r"too many documents are rejected: here; found 50\.0%: a \(2\), b \(1\), cannot be read \(1\); expected at most 30"
    with pytest.raises(DataError, match=told):
        rejects.check(0.3, where="here", way_out="fix it")


def test_reading_in_one_process_counts_rejects_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"id": f"{n}", "text": "a" if n else " "}) for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.csv").touch()
    config = DocumentsConfig(uri=str(tmp_path))
    with pytest.raises(DataError, match=r"found 2\.0%: text is empty \(1\); expected at most 1\.0%"):
        list(read_rows(config, labelled=False))
    assert sum(map(len, read_rows(config, labelled=False, max_reject_share=0.02))) == 49
    said = capsys.readouterr().err
    assert said.endswith("rejected 1 of 50 documents: text is empty (1)\n") and "left out: 1 *.csv" in said
    (tmp_path / "c.jsonl").write_text("[{},\n" * 500)
    with pytest.raises(DataError, match=r"found \d\d\.\d%: text is empty \(1\), not JSON lines \(1\)"):
        list(read_rows(config, labelled=False, max_reject_share=0.05))

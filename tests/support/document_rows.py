"""The rows that documents' rules make of one file, as dictionaries."""

from typing import Any

import pyarrow as pa

from xmc_ray.data.documents import DocumentsConfig, Rules

GOOD = {"reason": None, "detail": None}


def parse(lines: bytes, **further: Any) -> list[dict[str, Any]]:
    rows = Rules.of(DocumentsConfig(uri="/folder", **further), labelled=True).from_json(lines, "/folder/file", 7).to_pylist()
    assert [(row.pop("file"), row.pop("row")) for row in rows] == [("/folder/file", 7 + place) for place in range(len(rows))]
    return rows


def from_parquet(table: pa.Table, *texts: str, **further: Any) -> list[dict[str, Any]]:
    config = DocumentsConfig(uri="s3://bucket", text=list(texts or ["text"]), **further)
    rules = Rules.of(config, labelled="labels" in table.column_names)
    rows = rules.from_parquet(table, "s3://bucket/file", 0).to_pylist()
    assert [(row.pop("file"), row.pop("row")) for row in rows] == [("s3://bucket/file", place) for place in range(len(rows))]
    return rows

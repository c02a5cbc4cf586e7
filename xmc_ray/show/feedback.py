"""Feedback that lies beside nights, and what it says of one."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from xmc_ray import storage
from xmc_ray.data.feedback import Feedback
from xmc_ray.errors import DataError
from xmc_ray.metrics.live import LivePrecision, Share
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import FileInfo

FILE = "feedback.parquet"  # see `data.feedback`
_MOST_BYTES = 256 << 20  # of feedback that is read for a page


def feedback_of(*folders: str) -> FileInfo | None:
    """The feedback in the first of ``folders`` that has any."""
    for uri in (join(folder, FILE) for folder in folders):
        if storage.exists(uri):
            return storage.stat(uri)
    return None


def live_precision(files: Sequence[FileInfo], feedback: FileInfo) -> Share:
    """Of the tags in ``files`` that are judged, those that are accepted. DataError if one or the other cannot be read."""
    if feedback.size > _MOST_BYTES:
        raise DataError("too much feedback for a page", where=feedback.uri, found=f"{feedback.size:,} bytes")
    verdicts = Feedback.read(feedback.uri)
    live, wanted = LivePrecision(verdicts), ds.field("id").isin(verdicts.ids)
    for file in files:
        filesystem, path = storage.arrow_filesystem(file.uri)
        with storage.explained(file.uri):
            try:
                fragment = ds.ParquetFileFormat().make_fragment(path, filesystem)
                for batch in fragment.to_batches(columns=["id", "labels", "scores"], filter=wanted, use_threads=False):
                    live.update(pa.Table.from_batches([batch]))
            except pa.ArrowException as error:
                raise DataError("a file of tags cannot be read", where=file.uri, found=error) from None
    return live.total

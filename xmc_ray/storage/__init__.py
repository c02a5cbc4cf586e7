"""Files and folders, on a local path or on S3.

`address` parses addresses and opens file systems, `files` reads and writes, `folders` copies whole folders between this
machine and storage, `lease` keeps a second job out of a folder. What most callers need is offered here, as
``storage.read_json``.
"""

from xmc_ray.storage.address import Uri, arrow_filesystem, explained, filesystem, is_local, is_unavailable, split
from xmc_ray.storage.files import (
    FileInfo,
    absolute,
    all_files,
    copy_file,
    create,
    exists,
    is_empty,
    join,
    list_files,
    move,
    new_file,
    patiently,
    read_bytes,
    read_json,
    read_parquet,
    remove,
    stat,
    write_bytes,
    write_json,
    write_parquet,
)

__all__ = [
    "FileInfo",
    "Uri",
    "absolute",
    "all_files",
    "arrow_filesystem",
    "copy_file",
    "create",
    "exists",
    "explained",
    "filesystem",
    "is_empty",
    "is_local",
    "is_unavailable",
    "join",
    "list_files",
    "move",
    "new_file",
    "patiently",
    "read_bytes",
    "read_json",
    "read_parquet",
    "remove",
    "split",
    "stat",
    "write_bytes",
    "write_json",
    "write_parquet",
]

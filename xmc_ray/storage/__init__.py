"""Files and folders, on a local path or on S3.

`address` says what an address means and how it is reached, `files` reads and writes, `folders` copies whole folders between
this machine and storage, `lease` keeps a second job out of a folder. Most callers need no more than
``storage.read_json`` and its kin, offered here.
"""

from xmc_ray.storage.address import Uri, arrow_filesystem, explained, filesystem, is_local, split
from xmc_ray.storage.files import (
    PATIENCE,
    FileInfo,
    absolute,
    all_files,
    copy_file,
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
    "PATIENCE",
    "FileInfo",
    "Uri",
    "absolute",
    "all_files",
    "arrow_filesystem",
    "copy_file",
    "exists",
    "explained",
    "filesystem",
    "is_empty",
    "is_local",
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

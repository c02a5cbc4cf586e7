"""Files and folders, on a local path or on S3.

`address` normalises addresses and opens file systems, `listing` says which files there are, `files` reads and writes,
`folders` copies whole folders between this machine and storage, `places` checks where a job writes before it begins, `lease`
keeps a second job out of a folder, `outage` says that storage does not answer. What most callers need is offered here, as
``storage.read_json``.
"""

from xmc_ray.storage.address import Address as Address
from xmc_ray.storage.address import ModelName as ModelName
from xmc_ray.storage.address import Source as Source
from xmc_ray.storage.address import Uri as Uri
from xmc_ray.storage.address import arrow_filesystem as arrow_filesystem
from xmc_ray.storage.address import explained as explained
from xmc_ray.storage.address import filesystem as filesystem
from xmc_ray.storage.address import is_local as is_local
from xmc_ray.storage.address import is_unavailable as is_unavailable
from xmc_ray.storage.address import normalise as normalise
from xmc_ray.storage.files import create as create
from xmc_ray.storage.files import join as join
from xmc_ray.storage.files import move as move
from xmc_ray.storage.files import new_file as new_file
from xmc_ray.storage.files import patiently as patiently
from xmc_ray.storage.files import read_bytes as read_bytes
from xmc_ray.storage.files import read_json as read_json
from xmc_ray.storage.files import read_parquet as read_parquet
from xmc_ray.storage.files import remove as remove
from xmc_ray.storage.files import remove_empty as remove_empty
from xmc_ray.storage.files import write_bytes as write_bytes
from xmc_ray.storage.files import write_json as write_json
from xmc_ray.storage.files import write_parquet as write_parquet
from xmc_ray.storage.listing import FileInfo as FileInfo
from xmc_ray.storage.listing import all_files as all_files
from xmc_ray.storage.listing import exists as exists
from xmc_ray.storage.listing import is_empty as is_empty
from xmc_ray.storage.listing import is_hidden as is_hidden
from xmc_ray.storage.listing import is_temporary as is_temporary
from xmc_ray.storage.listing import list_files as list_files
from xmc_ray.storage.listing import stat as stat
from xmc_ray.storage.listing import subfolders as subfolders
from xmc_ray.storage.listing import visible_files as visible_files

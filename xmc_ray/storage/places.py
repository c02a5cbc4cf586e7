"""The places of a job, looked at before it begins: those that it writes to can be written, and are not those that it reads."""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from xmc_ray.errors import ConfigError
from xmc_ray.storage.address import below, explained, filesystem, is_local, split
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import is_hidden

_PROBE = bytes(4096)  # a full disk may take an empty file


def check_apart(writes: Mapping[str, str | None], reads: Mapping[str, str | list[str] | None]) -> None:
    """Raises ConfigError if a place to write to lies in one to be read, or the other way round; keys are names of settings.

    Links in what is read are followed, as listings do. Its hidden folders may be written to: listings leave them out.
    """
    for source, addresses in reads.items():
        for address in [addresses] if isinstance(addresses, str) else addresses or []:
            links = list(_links(address))
            for output, place in writes.items():
                if place is not None:
                    _check_pair(output, place, source, address, links)


def _check_pair(output: str, place: str, source: str, address: str, links: Iterable[tuple[str, str]]) -> None:
    way_out = f"choose another {output}: what is written there would be read as {source}"
    for link, folder in [("", address), *links]:
        path = below(place, folder)
        if path is not None and not is_hidden(path):
            found = f"the link {link}" if link else None
            what, expected = f"{output} lies in {source}", f"a place outside {folder}"
            raise ConfigError(what, where=place, found=found, expected=expected, way_out=way_out)
    if below(address, place) is not None:
        raise ConfigError(f"{source} lies in {output}", where=address, expected=f"a place outside {place}")


def _links(uri: str) -> Iterator[tuple[str, str]]:
    """The links to folders that a listing of input follows, and where they lead."""
    waiting = [split(uri)[1]] if is_local(uri) else []
    seen = set(waiting)
    while waiting:
        for folder, names, _ in os.walk(waiting.pop()):
            names[:] = [name for name in names if not is_hidden(f"/{name}")]
            for link in filter(os.path.islink, (os.path.join(folder, name) for name in names)):
                target = os.path.realpath(link)
                if below(folder, target) is None and target not in seen:  # else it leads back up
                    yield link, target
                    seen.add(target)
                    waiting.append(target)


def check_writable(folder: str) -> None:
    """Raises ConfigError unless a file can be written in ``folder``, or where it would be created; leaves nothing behind."""
    probe = f".probe.{uuid.uuid4().hex}"  # by its name a temporary file, should this process be killed
    if not is_local(folder):
        fs, bucket_and_key = filesystem(join(folder, probe))
        with explained(folder, missing=ConfigError):
            fs.pipe_file(bucket_and_key, b"-")
            fs.rm_file(bucket_and_key)
        return
    path = Path(split(folder)[1])
    with explained(folder, missing=ConfigError):
        while not _exists(path):
            path = path.parent
        file = path / probe
        try:
            file.write_bytes(_PROBE)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            if _exists(file):
                file.unlink()


def _exists(path: Path) -> bool:
    """Unlike ``path.exists()``, raises OSError for what may not be looked at or lies behind a file."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True

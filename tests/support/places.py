"""Small folders for tests of storage."""

from pathlib import Path

from xmc_ray import storage


def make_folder(folder: Path, *names: str) -> Path:
    """``folder`` with files of these names, each of which holds its own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below ``folder``, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(place: str, *suffixes: str) -> list[str]:
    """What `storage.list_files` lists in the folder ``place``, by relative address."""
    return [file.uri.removeprefix(f"{place}/") for file in storage.list_files(place, suffixes)]

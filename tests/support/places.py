"""Small local folders for tests of storage."""

from pathlib import Path


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

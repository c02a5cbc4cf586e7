"""A night as pages show it: finished or not, whole or damaged, and its figures; whatever is wrong with it is a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from xmc_ray import storage
from xmc_ray.errors import XmcError
from xmc_ray.on_ray.tag import nights
from xmc_ray.on_ray.tag.nights import IDENTITY, REMOVED, SUCCESS, WORK, manifest_of, marker_of, read_own, tag_files
from xmc_ray.storage.files import join
from xmc_ray.storage.listing import FileInfo

State = Literal["finished", "unfinished", "damaged"]


@dataclass(frozen=True)
class Night:
    """``note``: what is wrong with it, or what goes on there. A damaged night has a manifest only if that can be read."""

    folder: str
    state: State
    note: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileInfo, ...] = ()

    @property
    def day(self) -> str:
        """YYYY-MM-DD."""
        return nights.day_of(self.folder)

    @property
    def run(self) -> str:
        """What identifies its content; empty unless it is finished."""
        return str(self.manifest.get("run", "")) if self.state == "finished" else ""


def read_night(folder: str) -> Night:
    """The night in ``folder``, whatever its state; never raises for what it holds."""
    try:
        marker = marker_of(folder)
        if marker is None:
            return _without_marker(folder)
        manifest = manifest_of(folder)
        files = tuple(tag_files(folder))
        replaced = read_own(join(folder, WORK, IDENTITY))
        others = replaced is not None and replaced["run"] != marker["run"]
        note = "Another run is being made that will replace this night." if others else ""
        return Night(folder, "finished", note, manifest, files)
    except XmcError as error:
        return Night(folder, "damaged", f"This night cannot be shown: {error}.", _manifest(folder))
    except (KeyError, TypeError, ValueError, AttributeError):
        return Night(folder, "damaged", "This night cannot be read: another version of xmc_ray may have written it.")


def _without_marker(folder: str) -> Night:
    if storage.exists(join(folder, SUCCESS)):
        note = f"Its {SUCCESS} cannot be read: it is damaged, or another version of xmc_ray has written it."
        return Night(folder, "damaged", note, _manifest(folder))
    if storage.exists(join(folder, REMOVED)):
        return Night(folder, "unfinished", "This night has been removed in part; `nights remove` goes on with it.")
    begun = read_own(join(folder, WORK, IDENTITY))
    who = f" by run {begun['run']}" if begun else ""
    return Night(folder, "unfinished", f"This night has been begun{who} and is not finished: it has no {SUCCESS} yet.")


def _manifest(folder: str) -> dict[str, Any]:
    return read_own(join(folder, nights.MANIFEST)) or {}


def count(manifest: Mapping[str, Any], name: str) -> float | None:
    """A figure of the manifest; None if it lacks it."""
    value = manifest.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def drift(manifest: Mapping[str, Any], since: str) -> float | None:
    """The PSI against ``training`` or the ``previous`` night; None if it was not measured."""
    drifts = manifest.get("drift")
    return count(drifts, since) if isinstance(drifts, Mapping) else None


def seconds(manifest: Mapping[str, Any]) -> float | None:
    """From the start of the night to its end; None if the manifest does not say."""
    try:
        started, ended = (datetime.fromisoformat(str(manifest[name])) for name in ("started", "ended"))
        return (ended - started).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None

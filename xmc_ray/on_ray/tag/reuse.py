"""Which night's tags are reused for documents that are as they were."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xmc_ray.on_ray.tag import nights
from xmc_ray.settings import difference

_SETTINGS = ("k", "min_score", "min_precision", "hierarchy", "model", "rerank")  # those that change a document's tags
_MADE_OF = ("bundle", "hierarchy", "release", "arithmetic")


@dataclass(frozen=True)
class Previous:
    """``folder``: the night whose tags are reused; ``not_reused``: why there is none, though there might be one."""

    folder: str | None = None
    not_reused: str | None = None

    @classmethod
    def find(cls, named: str | None, this: str, identity: Mapping[str, Any]) -> "Previous":
        """The night that is ``named``, or the last one before ``this`` folder, if it was made as ``identity`` says this one is.

        Prints why there is none. DataError if what is named is no finished night.
        """
        if named is None:
            return cls()
        folder = nights.latest_before(this) if named == "last" else nights.named(named)
        if folder is None:
            print("nothing is reused: there is no finished night before this", flush=True)
            return cls()
        nights.tag_files(folder)
        different = _different(nights.manifest_of(folder), identity)
        if not different:
            return cls(folder)
        not_reused = f"nothing is reused: the night before had another {', '.join(dict.fromkeys(different))}: {folder}"
        print(not_reused, flush=True)
        return cls(None, not_reused)


def _different(known: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """In words, what one night was made of and another is not: the first setting, and the rest."""
    had, has = ({name: made["config"].get(name) for name in _SETTINGS} for made in (known, identity))
    setting = difference(had, has)
    parts = [name for name in _MADE_OF if known.get(name) != identity.get(name)]
    filters = ["set of filters"] if known.get("filters") != identity.get("filters") else []
    return [*([setting[0]] if setting else []), *parts, *filters]

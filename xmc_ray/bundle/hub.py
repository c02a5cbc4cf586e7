"""Bundles on a model hub, that of Hugging Face or one with its interface: ``hf://owner/name`` or ``hf://owner/name@revision``.

huggingface_hub does the talking: HF_ENDPOINT names another hub, HF_TOKEN or a login gives rights, HF_HUB_OFFLINE=1 takes what
was downloaded before. A bundle that has been looked at is known by its commit from there on, on every machine that loads it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmc_ray.errors import ConfigError, ModelError, UnavailableError, XmcError

_ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub(uri: str) -> bool:
    """Whether the address is one of a hub, right or wrong."""
    return uri.startswith("hf:")


def pinned(uri: str) -> str:
    """The address with the commit that it stands for now; any other address as it is. Raises as `download`."""
    return f"hf://{_parts(uri)[0]}@{download(uri).name}" if is_hub(uri) else uri


def download(uri: str) -> Path:
    """A local copy of all files at that revision, which nobody may change; one for all processes of this machine.

    Raises ConfigError for what is no address and for missing rights, ModelError if there is nothing, UnavailableError if the
    hub does not answer.
    """
    from huggingface_hub import snapshot_download

    name, revision = _parts(uri)
    with _explained(uri):
        return Path(snapshot_download(name, revision=revision))


def upload(folder: Path, name: str, *, private: bool | None, message: str) -> str:
    """Replace all files of the model ``owner/name`` by those of a folder, in one commit; the address with that commit.

    The model is created if it is not there. Raises as `download`, and ConfigError for one that is there and not as ``private``
    as asked for.
    """
    from huggingface_hub import HfApi

    uri = f"hf://{name}"
    _parts(uri)
    api = HfApi()
    with _explained(uri):
        api.create_repo(name, private=private, exist_ok=True)  # which leaves one that exists as it is
        if private is not None and api.model_info(name).private != private:
            found, way_out = ("private", "public")[private], "change that on the hub, or give another name"
            raise ConfigError("the model is there already", where=uri, found=f"a {found} one", way_out=way_out)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns="*")
    return f"{uri}@{commit.oid}"


def _parts(uri: str) -> tuple[str, str | None]:
    address = _ADDRESS.fullmatch(uri)
    if address is None:
        raise ConfigError("not an address of a model hub", where=uri, expected="hf://owner/name or hf://owner/name@revision")
    return address["name"], address["revision"]


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # all that the library raises, and what it talks HTTP with
        raise _told(uri, error) from None
    except Exception as error:
        if "httpx" in type(error).__module__:
            raise _told(uri, error) from None
        raise


def _told(uri: str, error: BaseException) -> XmcError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why it was looked for on this machine
    found, way_out = " ".join(str(error).split())[:300], "check HF_TOKEN or log in by `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.EntryNotFoundError):
        return ModelError("no such model on the hub", where=uri, found=found, way_out=way_out)
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ValueError) or (status and status < 500 and status not in (408, 429)):
        return ConfigError("the hub refuses", where=uri, found=found, way_out=way_out)
    return UnavailableError("the hub does not answer", where=uri, found=found, way_out="check HF_ENDPOINT, or try again")

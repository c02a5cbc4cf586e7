"""The job ``xmc-ray show``: serves the page on 127.0.0.1 until it is interrupted."""

import socket
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import Bounds, Settings

HOST = "127.0.0.1"  # never another one: whoever reaches the page reads the documents


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Settings):
    """Look at runs and nights in a browser, on this machine alone."""

    folder: storage.Source
    """Where runs and outputs with nights lie, at any level below; may be given as the first argument."""
    port: Annotated[int, Bounds(ge=0, le=65535)] = 0
    """Port on 127.0.0.1; 0 takes a free one."""
    open: bool = False
    """Open the page in a browser."""


def serve(config: ShowConfig) -> None:
    """Print the address and answer until a signal ends it.

    Raises ConfigError if the port is taken or the extra ``show`` is not installed, DataError if there is no such folder.
    """
    try:
        import uvicorn

        from xmc_ray.show.app import application
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        way_out = "pip install 'xmc_ray[show]'"
        raise ConfigError("the page needs a package that is not installed", found=error.name, way_out=way_out) from None
    if storage.is_local(config.folder) and not storage.subfolders(config.folder) and storage.is_empty(config.folder):
        raise DataError("nothing to show", where=config.folder, found="no such folder, or an empty one")
    app = application(config.folder)
    with listening(config.port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}/"
        print(f"{address}  (this machine only; Ctrl-C ends it)", flush=True)
        if config.open:
            webbrowser.open(address)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


def listening(port: int) -> socket.socket:
    """A socket on 127.0.0.1 that listens; ConfigError if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # whoever is quicker than the server's start waits
    except OSError as error:
        listener.close()
        way_out = "choose another --port, or 0"
        raise ConfigError("the port is not free", where=port, found=error.strerror or error, way_out=way_out) from None
    return listener

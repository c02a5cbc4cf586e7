"""Keeps a node's logs and Ray's events beyond the node: copies both to ``PLACE`` while Ray runs, and once more at the end.

    KEEP_AS=<name of the node> python cluster/node/keep.py PLACE [seconds]

``PLACE/<name>/<session>/logs/`` is the log folder of Ray's session. ``PLACE/<name>/events/`` has, as JSON lines, what Ray posts
to ``RAY_DASHBOARD_AGGREGATOR_AGENT_EVENTS_EXPORT_ADDR``: definition and states of every job, node, worker, actor and task. A
storage that does not answer is tried again at the next turn; SIGTERM ends it after a last turn.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from xmc_ray import storage
from xmc_ray.errors import XmcError

SECONDS = 60.0  # from one turn to the next
PORT = 8084
MOST = 100_000  # events that wait for a storage which does not answer; the oldest go first
SESSIONS = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")  # Ray's folder unless --temp-dir says otherwise


class Keeper:
    """The state of a node's records: which logs are copied, and which events wait to be."""

    def __init__(self, place: str, name: str, sessions: Path = SESSIONS) -> None:
        self.place, self.sessions = storage.join(place, name), sessions
        self.copied: dict[Path, tuple[int, int]] = {}
        self.events: list[str] = []
        self.lock = threading.Lock()

    def turn(self) -> None:
        """Copy what is new since the last turn. What fails is told, and tried again at the next."""
        try:
            self._keep_events()
            self._keep_logs()
        except (XmcError, OSError) as error:
            print(f"not kept yet: {error}", flush=True)

    def receive(self, events: list[object]) -> None:
        """Take events, to be kept at the next turn."""
        lines = [f"{json.dumps(event)}\n" for event in events]
        with self.lock:
            self.events = [*self.events, *lines][-MOST:]

    def _keep_events(self) -> None:
        with self.lock:
            events, self.events = self.events, []
        if not events:
            return
        try:
            storage.write_bytes(storage.join(self.place, "events", f"{time.time_ns()}.jsonl"), "".join(events).encode())
        except XmcError:
            with self.lock:
                self.events = [*events, *self.events][-MOST:]
            raise

    def _keep_logs(self) -> None:
        for path in sorted(self.sessions.glob("session_2*/logs/**/*")):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
            if self.copied.get(path) != version:
                relative = path.relative_to(self.sessions).as_posix()
                storage.write_bytes(storage.join(self.place, relative), path.read_bytes())
                self.copied[path] = version


def receiver(keeper: Keeper, port: int) -> ThreadingHTTPServer:
    """A server on this machine alone that hands the events posted to it to ``keeper``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keeper.receive(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """A line for each post would drown the rest."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(place: str, seconds: float = SECONDS) -> None:
    keeper, ended = Keeper(place, os.environ["KEEP_AS"]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server = receiver(keeper, int(os.environ.get("KEEP_PORT", PORT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not ended.wait(seconds):
        keeper.turn()
    keeper.turn()


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:3]))

"""A model hub on this machine, in memory: of the interface of Hugging Face's what uploads and downloads of models need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """``models``: the commits (id, files) of each, the newest last. ``status``: what every request gets, if set."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.models: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.status: int | None = None
        self.asked: list[str] = []

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The id and the files of a commit, by its id or as ``main``."""
        commits = self.models.get(name, [])
        return next((commit for commit in reversed(commits) if revision in ("main", commit[0])), None)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        """The id of a further commit."""
        files = dict(self.models[name][-1][1])
        for line in lines:
            path = line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(path)
        content = repr([(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())])
        commit = hashlib.sha1(f"{len(self.models[name])} {content}".encode()).hexdigest()
        self.models[name].append((commit, files))
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path is None:
            return
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if name in self.hub.models:
                return self._send({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}, 409)
            self.hub.models[name] = [("0" * 40, {})]
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
            return self._send({"url": f"{self.hub.endpoint}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+?)/preupload/main", path):
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self._send({"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]})
        if found := re.fullmatch(r"/api/models/(.+?)/commit/main", path):
            commit = self.hub.commit(found[1], [json.loads(line) for line in body.splitlines() if line.strip()])
            url = f"{self.hub.endpoint}/{found[1]}/commit/{commit}"
            return self._send({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})
        return self._send({"error": "not found"}, 404)

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return None
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (known := self.hub.files(found[1], found[2] or "main")) is None:
                return self._missing(found[1])
            siblings = [{"rfilename": name} for name in known[1]]
            info = {"id": found[1], "modelId": found[1], "sha": known[0], "siblings": siblings, "tags": []}
            return self._send(info | {"private": found[1] in self.hub.private, "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            if (known := self.hub.files(found[1], found[2])) is None:
                return self._missing(found[1])
            sums = {name: (len(data), hashlib.sha1(data).hexdigest()) for name, data in known[1].items()}
            entries = [{"type": "file", "path": name, "size": size, "oid": sum_} for name, (size, sum_) in sums.items()]
            return self._send(entries)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            known = self.hub.files(found[1], found[2])
            if known is None or found[3] not in known[1]:
                return self._missing(found[1], "EntryNotFound" if known else None)
            data = known[1][found[3]]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": known[0]}
            return self._send(data, headers=headers)
        return self._send({"error": "not found"}, 404)

    do_HEAD = do_GET

    def _path(self) -> str | None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if self.hub.status is not None:
            self._send({"error": "as told"}, self.hub.status)
            return None
        return path

    def _missing(self, name: str, code: str | None = None) -> None:
        code = code or ("RevisionNotFound" if name in self.hub.models else "RepoNotFound")
        self._send({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": f"{code}: {name}"})

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        _Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield _Handler.hub
        finally:
            server.shutdown()

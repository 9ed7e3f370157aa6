"""A hub on 127.0.0.1 that speaks what huggingface_hub asks of one, notes what it was asked, and fails on demand."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Folders by commit, and commits by branch."""

    commits: dict[str, Path]
    branches: dict[str, str]
    gated: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


def commit_id(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class FakeHub:
    """``cuts``: how many bytes of a file are sent before the connection ends; after that it answers 503 until `heal`.

    ``stalls``: the same, but it then waits for the event.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, tuple[int, threading.Event]] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    on_get: Callable[[Request], None] = lambda request: None

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, folder: Path, *, branch: str = "main", gated: bool = False) -> str:
        """Publish a folder; its commit."""
        commit = commit_id(str(folder))
        repo = self.repos.setdefault(name, Repo({}, {}, gated))
        repo.commits[commit] = folder
        repo.branches[branch] = commit
        return commit

    def heal(self) -> None:
        self.cuts.clear()
        self.dead.clear()

    def gets(self, suffix: str = ".safetensors") -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(suffix)]

    # -- answers --

    def _answer(self, handler: Any) -> None:
        path = unquote(urlsplit(handler.path).path)
        headers = handler.headers
        request = Request(handler.command, path, headers.get("Range"), headers.get("Authorization"))
        self.requests.append(request)
        if path.startswith("/broken/") or "/broken/" in path:
            handler.close_connection = True
            return
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            name, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            name, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        repo = self.repos.get(name)
        if repo is None:
            self._refuse(handler, 401, "RepoNotFound")
            return
        commit = repo.branches.get(revision, revision)
        folder = repo.commits.get(commit)
        if folder is None:
            self._refuse(handler, 404, "RevisionNotFound")
        elif kind == "revision":
            siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            self._json(handler, {"id": name, "sha": commit, "siblings": siblings, "tags": []})
        elif repo.gated:
            self._refuse(handler, 403, "GatedRepo")
        elif kind == "tree":
            self._json(
                handler,
                [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": commit_id(path.name)}
                    for path in sorted(folder.iterdir())
                ],
            )
        else:
            self._send(handler, request, folder / parts[-1], commit)

    def _refuse(self, handler: Any, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("X-Error-Message", f"{code} it is")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _json(self, handler: Any, value: Any) -> None:
        data = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _send(self, handler: Any, request: Request, path: Path, commit: str) -> None:
        if not path.is_file():
            self._refuse(handler, 404, "EntryNotFound")
            return
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        if request.method == "GET":
            self.on_get(request)
            if path.name in self.dead:
                self._refuse(handler, 503, "Unavailable")
                return
        begin, end = 0, len(data)
        if request.range:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        handler.send_response(206 if request.range else 200)
        handler.send_header("X-Repo-Commit", commit)
        handler.send_header("ETag", f'"{etag}"')
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(end - begin))
        if request.range:
            handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        handler.end_headers()
        if request.method == "HEAD":
            return
        if path.name in self.stalls:
            num_bytes, event = self.stalls.pop(path.name)
            handler.wfile.write(data[begin : begin + num_bytes])
            handler.wfile.flush()
            event.wait(60)
            handler.close_connection = True
        elif path.name in self.cuts:
            handler.wfile.write(data[begin : begin + self.cuts.pop(path.name)])
            handler.close_connection = True
            self.dead.add(path.name)
        else:
            handler.wfile.write(data[begin:end])

"""A small hub on the loopback interface: what huggingface_hub asks for a model, and every way in which it can go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories and misbehaviour, read by the handler at every request."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    """Repository: token that opens it."""
    delay: float = 0.0
    """Seconds before anything is answered."""
    status: int = 0
    """Answer everything with this status instead."""
    ignore_range: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """File: bytes after which the connection is closed, one number for each GET in turn."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range header of each request."""
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, folder: Path) -> None:
        self.repos[repo] = {file.name: file.read_bytes() for file in folder.iterdir()}

    def gets(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for a file."""
        return [header for method, path, header in self.requests if method == "GET" and path.endswith("/" + name)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.hub
        path = unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.append(self.headers.get("Authorization"))
        time.sleep(hub.delay)
        if hub.status:
            return self.refuse(hub.status, "")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api or resolve).group(1, 2) if api or resolve else ("", "")
        if repo not in hub.repos:
            return self.refuse(404, "RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        files = hub.repos[repo]
        if api:
            siblings = [{"rfilename": name, "size": len(raw), "blobId": "0" * 40} for name, raw in files.items()]
            return self.send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})
        assert resolve
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.gated[repo]}":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        name = resolve.group(3)
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        self.send(files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}, name)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, raw: bytes, headers: dict[str, str], name: str = "") -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        partial = wanted is not None and not self.hub.ignore_range
        body = raw
        if wanted and partial:
            start, last = int(wanted[1]), min(int(wanted[2] or len(raw)), len(raw) - 1)
            body = raw[start : last + 1]
            headers = headers | {"Content-Range": f"bytes {start}-{last}/{len(raw)}"}
        self.send_response(206 if partial else 200)
        for key, value in (headers | {"Content-Length": str(len(body)), "Accept-Ranges": "bytes"}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts.get(name):
            body = body[: self.hub.cuts[name].pop(0)]
        with contextlib.suppress(ConnectionError):  # a client that has seen enough hangs up
            self.wfile.write(body)


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on a free port of the loopback interface."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let huggingface_hub, which reads its environment at import, talk to this hub with an empty cache and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")

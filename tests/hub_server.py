"""A model hub on the loopback, for huggingface_hub to download from.

It serves folders as repositories and speaks what snapshot_download of huggingface_hub 2.4.0 needs:
the model's info and tree, HEAD and GET of files with their ETag and commit, ranges, redirects of
renamed repositories and of large files to another host, and the errors that are told in
X-Error-Code. After huggingface_hub's own source (_snapshot_download.py, file_download.py,
utils/_http.py) and https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

TOKEN, STRANGERS_TOKEN = "hf_test_member", "hf_test_stranger"
WARNING = "You are sending unauthenticated requests to the hub."
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".model")
_API = re.compile(
    r"/api/models/(?P<id>[^/]+/[^/]+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<cdn>cdn/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Cut:
    """How a file's download breaks: after some bytes, so many times, politely or by a reset."""

    after: int
    times: int = 1
    reset: bool = False


@dataclass
class HubServer:
    """Serves repositories while it is entered.

    Attributes:
        repositories: folders by `org/name` or, for other revisions than main, `org/name@revision`.
        gated: repositories whose files only TOKEN may fetch.
        private: repositories that only TOKEN may see.
        renamed: old ids by new ids.
        forbidden: files that nobody may fetch, whatever the token.
        cuts: by file name, how its download breaks.
        requests: what has been asked for: method, path.
        sent: how many bytes of each file were sent, by its name.
    """

    repositories: Mapping[str, Path]
    gated: Collection[str] = ()
    private: Collection[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    forbidden: Collection[str] = ()
    cuts: dict[str, Cut] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def handler(self) -> type[Handler]:
        return Handler

    def __enter__(self) -> HubServer:
        handler = type("Handler", (self.handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that uses this hub, with its cache in home."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
            and not name.lower().endswith("_proxy")
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            **more,
        }

    def fetched(self) -> list[str]:
        """Return the files whose contents were asked for, sorted, and forget all requests."""
        files = [
            match["file"]
            for method, path in self.requests
            if method == "GET" and (match := _FILE.fullmatch(path))
        ]
        self.requests.clear()
        return sorted(files)

    def folder(self, repo_id: str, revision: str) -> Path | None:
        """Return the folder of a repository at a branch, a tag or a commit."""
        for name, folder in self.repositories.items():
            known_id, _, known = name.partition("@")
            if known_id == repo_id and revision in ((known or "main"), commit_of(folder)):
                return folder
        return None


def commit_of(folder: Path) -> str:
    """Return the commit hash that a folder is served as."""
    digest = hashlib.sha1()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0{_blob_id(path.read_bytes())}\0".encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Any
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        raw_path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        match = _API.fullmatch(raw_path) or _FILE.fullmatch(raw_path)
        if match is None:
            return self._refuse(404, "", "Not found")
        found = match.groupdict()
        repo_id, revision = found["id"], unquote(found["revision"] or "main")
        if new := self.hub.renamed.get(repo_id):
            return self._send(307, {"Location": self.path.replace(repo_id, new, 1)})
        if found.get("cdn"):
            return self._content(self.hub.folder(repo_id, revision) / unquote(found["file"]))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, STRANGERS_TOKEN):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        known = {name.partition("@")[0] for name in self.hub.repositories}
        if repo_id not in known or (repo_id in self.hub.private and token != TOKEN):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        folder = self.hub.folder(repo_id, revision)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if match.re is _API:
            return self._api(found["what"], repo_id, folder)
        if repo_id in self.hub.gated and token != TOKEN:
            return self._refuse(403 if token else 401, "GatedRepo", f"{repo_id} is gated")
        self._file(repo_id, folder, unquote(found["file"]))

    def _api(self, what: str | None, repo_id: str, folder: Path) -> None:
        names = [path.relative_to(folder).as_posix() for path in _files(folder)]
        answer: Any = {
            "id": repo_id,
            "sha": commit_of(folder),
            "private": repo_id in self.hub.private,
            "siblings": [{"rfilename": name} for name in names],
        }
        if what == "tree":
            answer = [self._tree_entry(folder, name) for name in names]
        headers = {"Content-Type": "application/json"}
        if "Authorization" not in self.headers:
            headers["X-HF-Warning"] = f"unauthenticated; {WARNING}"
        self._send(200, headers, json.dumps(answer).encode())

    def _tree_entry(self, folder: Path, name: str) -> dict[str, Any]:
        content = (folder / name).read_bytes()
        entry = {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
        if name.endswith(_LARGE):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, repo_id: str, folder: Path, name: str) -> None:
        headers = {"X-Repo-Commit": commit_of(folder)}
        path = folder / name
        if name in self.hub.forbidden:
            return self._refuse(403, "", f"{name} is not for your token", headers)
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if not name.endswith(_LARGE):
            return self._content(path, headers)
        content = path.read_bytes()
        port = self.hub._server.server_port
        self._send(
            302,
            headers
            | {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                # Another host by its name: the client sends it no token.
                "Location": f"http://localhost:{port}/cdn/{repo_id}/resolve/"
                f"{headers['X-Repo-Commit']}/{quote(name)}",
            },
        )

    def _content(self, path: Path, headers: Mapping[str, str] | None = None) -> None:
        content = path.read_bytes()
        more = {"ETag": f'"{_blob_id(content)}"', "Accept-Ranges": "bytes", **(headers or {})}
        if self.headers.get("Authorization") and "X-Repo-Commit" not in more:
            return self._refuse(400, "", "a token was sent to the content host")
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status, size = int(match[1]), 206, len(content)
            content = content[: int(match[2] or size) + 1]
            more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{size}"
        if self.command == "GET":
            self.hub.sent[path.name] = self.hub.sent.get(path.name, 0) + len(content) - start
        cut = self.hub.cuts.get(path.name)
        if cut is None or self.command == "HEAD" or cut.times == 0:
            return self._send(status, more, content[start:])
        cut.times -= 1
        self._send(status, more, content[start:], num_sent=cut.after)
        self.close_connection = True
        if cut.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _refuse(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        more = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, {"X-Error-Message": message, **more, **(headers or {})}, body)

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        body: bytes = b"",
        num_sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:num_sent])
            self.wfile.flush()

"""The hub on the loopback, for huggingface_hub to upload to.

It speaks what HfApi's create_repo, create_branch, preupload_lfs_files and create_commit of
huggingface_hub 2.4.0 need without xet, after its source (_commit_api.py, lfs.py, hf_api.py) and the
description of Git LFS's batch API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_server import STRANGERS_TOKEN, TOKEN, Handler, HubServer, _blob_id, commit_of

PART_BYTES = 1 << 14  # larger files go up in parts
_DO = re.compile(
    r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>branch|preupload|commit)/(?P<rev>[^/]+)"
)
_BATCH = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class UploadHub(HubServer):
    """A hub with repositories of folders `org/name` and `org/name@branch`, which can be changed.

    Attributes:
        home: for the folders, and for files that no commit has yet.
        fault: is told of each request's method and path, and returns the status of an error to
            answer with; 0 for none, -1 to hang up.
        ignored: names that a .gitignore in the repositories names.
        large: whether a file is kept by LFS; by default what the hub says of weights.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    home: Path = field(default_factory=Path)
    fault: Callable[[str, str], int] = lambda method, path: 0
    ignored: tuple[str, ...] = ()
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def handler(self) -> type[Handler]:
        return _UploadHandler

    @property
    def objects(self) -> Path:
        (self.home / "objects").mkdir(parents=True, exist_ok=True)
        return self.home / "objects"

    def make(self, name: str, start: Path | None = None) -> Path:
        """Make a repository or a branch; a new repository has what the hub puts there."""
        folder = self.repositories[name] = self.home / name
        if start is not None:
            shutil.copytree(start, folder)
        else:
            folder.mkdir(parents=True)
            (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return folder


class _UploadHandler(Handler):
    def do_POST(self) -> None:
        self._change()

    def do_PUT(self) -> None:
        self._change()

    def do_GET(self) -> None:
        if not self._fails():
            super().do_GET()

    def _fails(self) -> bool:
        status = self.hub.fault(self.command, unquote(urlsplit(self.path).path))
        if status > 0:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._refuse(status, "", "it was told to fail")
        elif status < 0:
            self.close_connection = True
            self.connection.close()
        return status != 0

    def _change(self) -> None:
        path = urlsplit(self.path).path
        if self._fails():
            return None
        self.hub.requests.append((self.command, unquote(path)))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/storage/"):  # of another host: the client sends it no token
            return self._stored(path, body) if not token else self._refuse(400, "", "a token")
        if token not in (TOKEN, STRANGERS_TOKEN):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self._validated(json.loads(body)["content"])
        if token != TOKEN:
            return self._refuse(403, "", "You don't have the rights to change this namespace")
        if path == "/api/repos/create":
            return self._created(json.loads(body))
        if match := _BATCH.fullmatch(path):
            return self._batch(json.loads(body))
        match = _DO.fullmatch(path)
        assert match is not None, path
        repo_id, what, revision = match["id"], match["what"], unquote(match["rev"])
        name = repo_id if revision == "main" else f"{repo_id}@{revision}"
        if repo_id not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if what == "branch":
            if name in self.hub.repositories:
                return self._refuse(409, "", "Reference already exists")
            self.hub.make(name, self.hub.repositories[repo_id])
            return self._json({})
        if name not in self.hub.repositories:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = self.hub.repositories[name]
        if what == "preupload":
            return self._modes(folder, json.loads(body)["files"])
        return self._commit(repo_id, folder, [json.loads(line) for line in body.splitlines()])

    def _created(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repositories:
            return self._json(answer | {"error": "You already created this model repo"}, 409)
        self.hub.make(repo_id)
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private = {*self.hub.private, repo_id}
        return self._json(answer)

    def _validated(self, content: str) -> None:
        front = (
            yaml.safe_load(content[4:].partition("\n---\n")[0]) if content[:4] == "---\n" else {}
        )
        errors = []
        if not isinstance(front.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        if not re.fullmatch("[a-z0-9.-]+", front.get("license", "mit")):
            errors.append({"message": '"license" must be one of [apache-2.0, mit, …]'})
        said = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": errors, "warnings": said}, 400 if errors else 200)

    def _modes(self, folder: Path, files: list[dict[str, Any]]) -> None:
        answer = []
        for file in files:
            path, is_large = folder / file["path"], file["path"].endswith(".safetensors")
            content = path.read_bytes() if path.is_file() else None
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if is_large else _blob_id(content)
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    "oid": oid,
                }
            )
        self._json({"files": answer})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        # The host of the storage has another name, and its addresses a signature.
        at = f"http://localhost:{self.hub._server.server_port}/storage"
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            signed = f"{oid}?X-Amz-Signature=c0ffee"
            if (self.hub.objects / oid).is_file():
                objects.append(each)
                continue
            upload: dict[str, Any] = {"href": f"{at}/whole/{signed}"}
            if size > PART_BYTES:
                numbers = range(1, -(-size // PART_BYTES) + 1)
                parts = {f"{number:05}": f"{at}/{number}/{signed}" for number in numbers}
                upload = {"href": f"{at}/done/{signed}"}
                upload["header"] = {"chunk_size": str(PART_BYTES), **parts}
            objects.append(each | {"actions": {"upload": upload}})
        self._json({"transfer": "basic", "objects": objects})

    def _stored(self, path: str, body: bytes) -> None:
        _, _, what, oid = path.split("/")
        parts = self.hub.home / "parts" / oid
        if what not in ("whole", "done"):
            parts.mkdir(parents=True, exist_ok=True)
            (parts / f"{int(what):05}").write_bytes(body)
            return self._send(200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if what == "done":
            asked = [f"{part['partNumber']:05}" for part in json.loads(body)["parts"]]
            body = b"".join((parts / number).read_bytes() for number in asked)
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "", "the contents have another SHA-256")
        (self.hub.objects / oid).write_bytes(body)
        return self._json({})

    def _commit(self, repo_id: str, folder: Path, lines: list[dict[str, Any]]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != commit_of(folder):
            return self._refuse(
                412, "", "A commit has happened since. Please refresh and try again."
            )
        contents: dict[str, bytes | None] = {}
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                contents[value["path"]] = (self.hub.objects / value["oid"]).read_bytes()
            else:
                assert kind == "deletedFile"
                contents[value["path"]] = None
        for name, content in contents.items():
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        self.hub.commits.append(lines[0]["value"] | {"names": sorted(contents)})
        oid = commit_of(folder)
        self._json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

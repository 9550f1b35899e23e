"""A server of byte ranges that also takes objects, as S3 does, whole and in parts.

The objects of the bucket are files in the folder, as for reading. It can do wrong what servers and
networks do wrong while something is written.
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

from range_server import Handler, RangeServer, etag_of

FAULTS = ("429", "500", "503", "cut", "lost", "stall")
"""What can go wrong with a request that writes; `lost` is an answer that does not arrive."""


@dataclass
class BucketServer(RangeServer):
    """Serves a folder, and takes objects into its subfolder `bucket`.

    Attributes:
        write_fault: returns what goes wrong with a request that writes; "" for nothing. It is given
            the method, the object's name, and the number of its part, or 0.
        on_write: called when an object has appeared, with its name; or when a part has come.
        uploads: the unfinished uploads, by id: the object's name and the files of its parts.
        written: the methods, names and sizes of what was asked for.
    """

    write_fault: Callable[[str, str, int], str] = lambda method, name, part: ""
    on_write: Callable[[str, int], None] = lambda name, part: None
    uploads: dict[str, tuple[str, dict[int, Path]]] = field(default_factory=dict)
    written: list[tuple[str, str, int]] = field(default_factory=list)
    in_bytes_per_second: float = 0.0

    @property
    def handler(self) -> type[Handler]:
        """What answers a request."""
        return _WritingHandler

    def __enter__(self) -> BucketServer:
        self._parts = Path(tempfile.mkdtemp(prefix="outliermerge-parts-"))
        self.putting, self._in_free_at = threading.Lock(), 0.0
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        shutil.rmtree(self._parts, ignore_errors=True)

    def wait_in(self, num_bytes: int) -> None:
        """Wait until so many bytes have come through the line that all requests share."""
        if self.in_bytes_per_second:
            with self._lock:
                now = time.monotonic()
                took = num_bytes / self.in_bytes_per_second
                self._in_free_at = max(self._in_free_at, now) + took
                pause = self._in_free_at - now
            time.sleep(pause)

    def objects(self, under: str = "") -> dict[str, bytes]:
        """Return the objects of the bucket whose names begin so."""
        bucket = self.folder / "bucket"
        paths = (path for path in sorted(bucket.rglob("*")) if path.is_file())
        found = {path.relative_to(bucket).as_posix(): path for path in paths}
        return {
            n.removeprefix(under): p.read_bytes() for n, p in found.items() if n.startswith(under)
        }


class _WritingHandler(Handler):
    serving: BucketServer

    def do_PUT(self) -> None:
        time.sleep(self.serving.latency_seconds)
        name, query = self._asked()
        part = int(query.get("partNumber", ["0"])[0])
        file = self.serving._parts / uuid4().hex
        self._take(file)
        self.serving.written.append(("PUT", name, file.stat().st_size))
        fault = self.serving.write_fault("PUT", name, part)
        if self._refused(fault):
            return
        path = self.serving.folder / name
        if part:
            upload = self.serving.uploads.get(query["uploadId"][0])
            if upload is None:
                return self._say(404, b"<Error><Code>NoSuchUpload</Code></Error>")
            upload[1][part] = file
            etag = _digest(file)
        else:
            with self.serving.putting:
                if self.headers.get("If-None-Match") == "*" and path.exists():
                    return self._say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                etag = self._appear(path, file)
        self.serving.on_write(name, part)
        self._answered(fault, 200, b"", etag)

    def do_POST(self) -> None:
        time.sleep(self.serving.latency_seconds)
        name, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.serving.written.append(("POST", name, 0))
        fault = self.serving.write_fault("POST", name, 0)
        if self._refused(fault):
            return
        if "delete" in query:
            keys = [html.unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            with self.serving.putting:
                for key in keys:
                    (self.serving.folder / name / key).unlink(missing_ok=True)
            deleted = "".join(f"<Deleted><Key>{html.escape(key)}</Key></Deleted>" for key in keys)
            return self._answered(fault, 200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        if "uploads" in query:
            upload = uuid4().hex
            self.serving.uploads[upload] = (name, {})
            answer = (
                f"<InitiateMultipartUploadResult><Bucket>bucket</Bucket>"
                f"<Key>{html.escape(name)}</Key><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
            return self._answered(fault, 200, answer.encode())
        found = self.serving.uploads.pop(query["uploadId"][0], None)
        if found is None:
            return self._say(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        numbers = [int(each) for each in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        whole = self.serving._parts / uuid4().hex
        with whole.open("wb") as file:
            for number in numbers:
                file.write(found[1][number].read_bytes())
        with self.serving.putting:
            etag = self._appear(self.serving.folder / name, whole)
        self.serving.on_write(name, 0)
        answer = (
            "<CompleteMultipartUploadResult><Location>here</Location><Bucket>bucket</Bucket>"
            f"<Key>{html.escape(name)}</Key><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        )
        self._answered(fault, 200, answer.encode(), etag)

    def do_DELETE(self) -> None:
        time.sleep(self.serving.latency_seconds)
        name, query = self._asked()
        self.serving.written.append(("DELETE", name, 0))
        fault = self.serving.write_fault("DELETE", name, 0)
        if self._refused(fault):
            return
        if "uploadId" in query:
            self.serving.uploads.pop(query["uploadId"][0], None)
        else:
            with self.serving.putting:
                (self.serving.folder / name).unlink(missing_ok=True)
        self._answered(fault, 204, b"")

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)

    def _take(self, file: Path) -> None:
        left = int(self.headers.get("Content-Length", 0))
        with file.open("wb") as out:
            while left and (data := self.rfile.read(min(left, 1 << 17))):
                self.serving.wait_in(len(data))
                out.write(data)
                left -= len(data)

    def _appear(self, path: Path, file: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, path)
        return etag_of(path)

    def _refused(self, fault: str) -> bool:
        """Do what goes wrong before anything is written; tell whether it does."""
        if fault.isdecimal():
            self._say(int(fault), b"<Error><Code>SlowDown</Code></Error>")
            return True
        if fault in ("cut", "stall"):
            if fault == "stall":
                time.sleep(self.serving.stall_seconds)
            self._hang_up()
            return True
        return False

    def _answered(self, fault: str, status: int, body: bytes, etag: str = "") -> None:
        if fault == "lost":
            return self._hang_up()
        self.send_response(status)
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


def _digest(file: Path) -> str:
    return f'"{hashlib.md5(file.read_bytes()).hexdigest()}"'

"""A server of byte ranges on the loopback: plain HTTP, and as much of S3 as reading needs.

It serves the files of a folder as /name/of/file, or as objects of the bucket `bucket`. It can be
slow, and it can do wrong what servers and networks do wrong.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PASSING = ("408", "429", "500", "502", "503", "504", "cut", "reset", "stall", "short", "long",
           "shifted", "whole", "unsaid")  # fmt: skip
"""Faults after which the same request can succeed."""
LASTING = ("etag", "other", "412")
"""Faults that look like another object, or like one that was written again."""


@dataclass
class RangeServer:
    """Serves a folder while it is entered.

    Attributes:
        folder: holds the files; those of S3 are in its subfolder `bucket`.
        fault: returns what goes wrong with a request for a range of a file; "" for nothing.
        stall_seconds: how long an answer stalls.
        latency_seconds, bytes_per_second: of every answer; of all answers together.
        has_versions: whether answers have ETags.
        ranges: what was asked for: the file's name, the start and the end (excluded).
    """

    folder: Path
    fault: Callable[[str, int, int], str] = lambda name, start, stop: ""
    stall_seconds: float = 3.0
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    has_versions: bool = True
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def handler(self) -> type[Handler]:
        """What answers a request."""
        return Handler

    def __enter__(self) -> RangeServer:
        handler = type("Handler", (self.handler,), {"serving": self})
        self._lock, self._free_at = threading.Lock(), 0.0
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def s3(self) -> dict[str, str]:
        """Return the environment with which obstore reads from this server."""
        return s3_at(self.url)

    def wait(self, num_bytes: int) -> None:
        """Wait until so many bytes have passed through the line that all answers share."""
        if self.bytes_per_second:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + num_bytes / self.bytes_per_second
                pause = self._free_at - now
            time.sleep(pause)


def s3_at(url: str) -> dict[str, str]:
    """Return the environment with which obstore uses an S3 server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_REGION": "us-east-1",
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients hang up on answers that are wrong


def etag_of(path: Path) -> str:
    """Return the ETag of a file: of its size, and of when it was written."""
    status = path.stat()
    state = f"{path.name} {status.st_size} {status.st_mtime_ns}"
    return f'"{hashlib.md5(state.encode()).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    serving: RangeServer
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    timeout = 30

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.serving.latency_seconds)
        parts = urlsplit(self.path)
        name = unquote(parts.path).strip("/")
        self.serving.headers.append(dict(self.headers))
        if name == "bucket" and "list-type" in parts.query:
            return self._list(parse_qs(parts.query).get("prefix", [""])[0])
        path = self.serving.folder / name
        if not path.is_file():
            return self._say(404, b"<Error><Code>NoSuchKey</Code></Error>")
        size = path.stat().st_size
        if self.headers.get("Range") and not size:
            return self._say(416, b"<Error><Code>InvalidRange</Code></Error>")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        if self.command == "GET":
            self.serving.ranges.append((name, start, stop))
        etag = etag_of(path) if self.serving.has_versions else ""
        fault = self.serving.fault(name, start, stop)
        wanted = self.headers.get("If-Match")
        if (wanted and wanted != etag and fault not in LASTING) or fault == "412":
            return self._say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        if fault.isdecimal():
            return self._say(int(fault), b"<Error><Code>SlowDown</Code></Error>")
        self._send(path, start, stop, size, etag, fault, status=206 if match else 200)

    def _send(
        self, path: Path, start: int, stop: int, size: int, etag: str, fault: str, *, status: int
    ) -> None:
        said = f"bytes {start}-{stop - 1}/{size}"
        if fault == "whole":
            status, start, stop = 200, 0, size
        if fault == "shifted":
            start, stop = max(start - 7, 0), max(stop - 7, 1)
            said = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        if fault == "other":
            content, etag = bytes(255 - byte for byte in content[:4096]) + content[4096:], '"other"'
        if fault == "etag":
            etag = '"written-again"'
        if fault == "short":
            content = content[: len(content) // 2]
        if fault == "long":
            content += b"\0" * 100
        self.send_response(status)
        if status == 206 and fault != "unsaid":
            self.send_header("Content-Range", said)
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "reset", "stall"):
            content = content[: len(content) // 3]
        view = memoryview(content)
        for at in range(0, len(view), 1 << 17):
            piece = view[at : at + (1 << 17)]
            self.serving.wait(len(piece))
            self.wfile.write(piece)
        if fault == "stall":
            time.sleep(self.serving.stall_seconds)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if fault in ("cut", "reset", "stall"):
            self.close_connection = True
            self.connection.close()

    def _list(self, prefix: str) -> None:
        bucket = self.serving.folder / "bucket"
        entries = []
        for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
            key = path.relative_to(bucket).as_posix()
            if key.startswith(prefix):
                entries.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
                    "<LastModified>2026-11-02T10:00:00.000Z</LastModified>"
                    f"<ETag>{escape(etag_of(path))}</ETag></Contents>"
                )
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name>'
            f"<IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"
        )
        self._say(200, body.encode())

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

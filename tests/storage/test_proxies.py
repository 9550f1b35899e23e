"""Proxies that the environment names are used for what is read by HTTP."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from range_server import RangeServer

from outliermerge.errors import OutlierMergeError
from outliermerge.storage import ranges
from outliermerge.storage.objects import Objects

CONTENT = bytes(range(256)) * 8
USER = "me:p%40ss"
AUTHORIZED = "Basic " + base64.b64encode(b"me:p@ss").decode()


class _Proxy(BaseHTTPRequestHandler):
    """Passes on requests for ranges, and bytes both ways after CONNECT; asks for a user."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def _is_known(self) -> bool:
        if self.headers.get("Proxy-Authorization") == AUTHORIZED:
            self.asked.append(self.path)
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        if not self._is_known():
            return
        assert urlsplit(self.path).scheme == "http"
        request = Request(self.path, headers={"Range": self.headers["Range"]})
        with build_opener(ProxyHandler({})).open(request) as answer:
            body = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Range", "ETag", "Content-Length"):
                self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(body)

    def do_CONNECT(self) -> None:
        if not self._is_known():
            return
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pass_on, args=(there, self.connection))
            back.start()
            _pass_on(self.connection, there)
            back.join()
        self.close_connection = True


def _pass_on(source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(ranges, "NUM_TRIES", 1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Proxy,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["http", "https"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    (tmp_path / "w").write_bytes(CONTENT)
    with RangeServer(tmp_path) as server:
        if request.param == "https":
            certificate = _certificate(tmp_path)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            inner = server._server
            inner.socket = context.wrap_socket(inner.socket, server_side=True)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield f"{request.param}://127.0.0.1:{server._server.server_port}/w"


def _certificate(folder: Path) -> Path:
    """Make a certificate for the loopback, and the key beside it."""
    cryptography = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime(2026, 1, 1)
    name = cryptography.Name([])
    address = cryptography.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        cryptography.CertificateBuilder(name, name, key.public_key(), 1, now)
        .not_valid_after(now + datetime.timedelta(days=36500))
        .add_extension(cryptography.SubjectAlternativeName([address]), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + made.public_bytes(pem))
    return path


def _read(address: str) -> bytes:
    objects, found = Objects(), bytearray()
    try:
        remote = objects.open(address)
        first = ranges.persistently(address, partial(remote.first, 100))
        assert first is not None
        ranges.persistently(address, lambda: remote.read(100, 1000, first[0], found.extend))
        return first[1] + bytes(found)
    finally:
        objects.close()


@pytest.mark.parametrize("variable", ["{}_proxy", "{}_PROXY", "all_proxy"])
def test_the_proxy_of_the_environment_is_used(
    proxy: tuple[str, list[str]], served: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server, asked = proxy
    scheme = served.partition(":")[0]
    name = variable.format(scheme.upper() if variable.isupper() else scheme)
    monkeypatch.setenv(name.replace("http_PROXY", "HTTP_PROXY"), f"http://{USER}@{server}")
    assert _read(served) == CONTENT[:1000]
    assert asked and all("127.0.0.1" in each for each in asked)


def test_what_no_proxy_names_is_asked_directly(
    proxy: tuple[str, list[str]], served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, asked = proxy
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{USER}@{server}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert _read(served) == CONTENT[:1000]
    assert not asked


def test_a_proxy_that_refuses_is_told_without_its_password(
    proxy: tuple[str, list[str]], served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = proxy
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:c0ffee@{server}")
    with pytest.raises(OutlierMergeError, match="407") as caught:
        _read(served)
    assert "c0ffee" not in str(caught.value)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"socks5://me:c0ffee@{server}")
    with pytest.raises(OutlierMergeError, match="is of a kind that is not known") as caught:
        _read(served)
    assert "c0ffee" not in str(caught.value)

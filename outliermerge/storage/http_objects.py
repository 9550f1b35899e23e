"""Files on web servers, and of the hub: ranges by HTTP, on connections that are used again.

By `http.client`, which reads into a buffer: 0.3 seconds of a processor for a gigabyte, where httpx
takes 1.1. And which client comes with huggingface_hub depends on its version.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from outliermerge.errors import OutlierMergeError, shown
from outliermerge.storage import ranges
from outliermerge.storage.addresses import lacks_secrets, with_secrets, without_secrets
from outliermerge.storage.ranges import (
    RefusedError,
    State,
    TransientError,
    Write,
    changed,
    check_state,
)

_MAX_REDIRECTS = 6
_PIECE_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_AS_THEY_ARE = "%/:?@!$&'()*+,;=[]~|"  # in addresses; what else is no letter is escaped
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class HttpClient:
    """Connections to servers, kept for each thread."""

    def __init__(self) -> None:
        self._all: list[_Kept] = []
        self._own = _Connections(self._all)
        self._proxies = urllib.request.getproxies()
        self._context: ssl.SSLContext | None = None

    def get(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Return the answer to a request, without following redirects.

        Raises:
            TransientError: there is none.
        """
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc.rpartition("@")[2])
        is_kept = key in self._own.kept
        if not is_kept:
            self._own.kept[key] = (self._connect(*key), None)
        connection, _ = self._own.kept[key]
        sent = dict(headers)
        sent |= _authorized(parts.netloc.rpartition("@")[0], "Authorization")
        proxy, user = self._proxy_of(*key) if parts.scheme == "http" else ("", "")
        sent |= _authorized(user, "Proxy-Authorization")
        path, query = (quote(part, safe=_AS_THEY_ARE) for part in (parts.path, parts.query))
        target = urlunsplit((*(key if proxy else ("", "")), path or "/", query, ""))
        try:
            connection.request("GET", target, headers=sent | {"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            self._own.kept[key] = connection, answer
            return answer
        except (OSError, http.client.HTTPException) as error:
            self.drop(url)
            if isinstance(error, ssl.SSLCertVerificationError):
                raise OutlierMergeError(f"https://{key[1]}: {error.verify_message}") from None
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                raise OutlierMergeError(
                    f"{key[0]}://{key[1]}: there is no server of the name {connection.host}"
                ) from None
            if is_kept and isinstance(error, (http.client.RemoteDisconnected, ConnectionError)):
                return self.get(url, headers)  # the server has closed a connection that was idle
            raise TransientError(_reason(error)) from None

    def drop(self, url: str) -> None:
        """Close this thread's connection to a server, on which half an answer may be left."""
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc.rpartition("@")[2])
        if (kept := self._own.kept.pop(key, None)) is not None:
            _close(*kept)

    def close(self) -> None:
        """Close the connections of all threads, which use them no more."""
        for kept in self._all:
            for pair in kept.values():
                _close(*pair)
            kept.clear()

    def _connect(self, scheme: str, host: str) -> http.client.HTTPConnection:
        if scheme not in ("http", "https"):
            raise OutlierMergeError(f"{scheme}://{host}: a redirect to what is no web server")
        proxy, user = self._proxy_of(scheme, host)
        server = proxy or host
        if scheme == "http":
            return http.client.HTTPConnection(server, timeout=ranges.STALL_SECONDS)
        if self._context is None:
            self._context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            server, timeout=ranges.STALL_SECONDS, context=self._context
        )
        if proxy:
            connection.set_tunnel(host, headers=_authorized(user, "Proxy-Authorization"))
        return connection

    def _proxy_of(self, scheme: str, host: str) -> tuple[str, str]:
        """Return the proxy for a server and its user, as the environment sets them; "" if none."""
        proxy = self._proxies.get(scheme) or self._proxies.get("all") or ""
        if not proxy or urllib.request.proxy_bypass(host):
            return "", ""
        kind, found, rest = proxy.rpartition("://")
        user, _, server = rest.partition("/")[0].rpartition("@")
        if found and kind.lower() != "http":
            raise OutlierMergeError(
                f"{scheme}://{host}: the proxy {kind}://{server} is of a kind that is not known: "
                "expected http://"
            )
        return server, user


_Kept = dict[tuple[str, str], tuple[http.client.HTTPConnection, http.client.HTTPResponse | None]]
"""By server the connection, and the answer that came last, which may not be read to its end."""


class _Connections(threading.local):
    def __init__(self, of_all_threads: list[_Kept]) -> None:
        self.kept: _Kept = {}
        of_all_threads.append(self.kept)


def _close(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse | None) -> None:
    if answer is not None:
        answer.close()
    connection.close()


class HttpObject:
    """A file on a web server.

    Args:
        address: what is shown of its address.
        client: keeps the connections.
        headers: sent to the address's own server, not to those that it redirects to.
        is_fixed: the address always gives the same bytes, so that no version need be sent.
    """

    def __init__(
        self,
        address: str,
        client: HttpClient,
        headers: Mapping[str, str] | None = None,
        *,
        is_fixed: bool = False,
    ) -> None:
        self.address, self._client, self._headers = address, client, dict(headers or {})
        self._is_fixed = is_fixed
        self._location: str | None = None  # where the server redirects to, until that is refused

    def first(self, num_bytes: int) -> tuple[State, bytes] | None:
        """Return the state and at most so many of its first bytes; None if there is none."""
        url, answer = self._ask({"Range": f"bytes=0-{num_bytes - 1}"})
        if answer.status in (404, 410, 416):  # 416: it is empty
            self._client.drop(url)
            return None if answer.status != 416 else (State(0, _version(answer)), b"")
        self._refuse(url, answer)
        length = _length(answer)
        if answer.status == 200:
            if length is None or length > num_bytes:
                self._client.drop(url)
                raise TransientError("the server gives whole files, no ranges of them")
            total = expected = length
        else:
            start, stop, total = self._range_of(url, answer)
            expected = stop - start
            if start != 0 or expected != min(num_bytes, total):
                self._client.drop(url)
                raise TransientError("the server answers with another range")
        content = bytearray()
        self._copy(url, answer, expected, content.extend)
        return State(total, _version(answer)), bytes(content)

    def read(self, start: int, stop: int, state: State, write: Write) -> None:
        """Hand the bytes from start to stop (excluded) of a known state to `write`, in order."""
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if state.version.startswith('"') and not self._is_fixed:  # others cannot be matched
            headers["If-Match"] = state.version
        url, answer = self._ask(headers)
        if answer.status in (404, 410, 412):
            self._client.drop(url)
            what = f"it has no version {state.version} any more"
            raise changed(self.address, what if answer.status == 412 else "it was removed")
        self._refuse(url, answer)
        if answer.status == 200 and (start, stop) == (0, state.num_bytes):
            found = (0, stop, _length(answer))
        elif answer.status == 200:
            self._client.drop(url)
            raise TransientError("the server gives whole files, no ranges of them")
        else:
            found = self._range_of(url, answer)
        if found[2] != state.num_bytes or _version(answer) != state.version:
            self._client.drop(url)
            check_state(self.address, state, State(found[2] or 0, _version(answer)))
        if found[:2] != (start, stop):
            self._client.drop(url)
            raise TransientError("the server answers with another range")
        self._copy(url, answer, stop - start, write)

    def _ask(self, headers: Mapping[str, str]) -> tuple[str, http.client.HTTPResponse]:
        """Return the answer to a request, after redirects, and the address that it is from."""
        if lacks_secrets(self.address):
            raise OutlierMergeError(
                f"{self.address}: its signature or password was left out where this was written. "
                "Name the model with it."
            )
        first = with_secrets(self.address)
        url = self._location or first
        for _ in range(_MAX_REDIRECTS):
            try:
                own = self._headers if _host(url) == _host(first) else {}
                answer = self._client.get(url, {**own, **headers})
            except OutlierMergeError:
                raise
            except ValueError as error:  # of its port, or of a name that no server can have
                what = "leads to what is" if url != first else "is"
                raise OutlierMergeError(
                    f"{self.address}: {what} no valid address: {error}"
                ) from error
            if answer.status not in _REDIRECTS:
                if url == self._location and answer.status in (400, 401, 403, 404, 410):
                    # Such an address holds for some minutes or hours: ask for a new one.
                    self._client.drop(url)
                    self._location = None
                    raise TransientError(f"the server answers {answer.status}")
                if url != first:
                    self._location = url
                return url, answer
            self._client.drop(url)
            url = self._redirected(url, answer.getheader("Location", ""))
        raise OutlierMergeError(f"{self.address}: is redirected too often")

    def _redirected(self, url: str, location: str) -> str:
        """Return where a server redirects to; on its own host the same user is asked for."""
        try:
            joined, user = urljoin(url, location), urlsplit(url).netloc.rpartition("@")[0]
            parts = urlsplit(joined)
            if user and "@" not in parts.netloc and _host(joined) == _host(url):
                return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc}"))
            return joined
        except ValueError as error:
            raise OutlierMergeError(
                f"{self.address}: leads to what is no valid address: {error}"
            ) from error

    def _refuse(self, url: str, answer: http.client.HTTPResponse) -> None:
        """Raise the error for an answer without the file's bytes."""
        encoding = answer.getheader("Content-Encoding", "identity")
        if answer.status in (200, 206) and encoding == "identity":
            return
        self._client.drop(url)
        if answer.status in _AGAIN:
            wait = answer.getheader("Retry-After", "")
            what = f"the server answers {answer.status}"
            raise TransientError(what, float(wait) if wait.isdecimal() else 0.0)
        if answer.status in (200, 206):
            raise OutlierMergeError(
                f"{self.address}: the server answers in the encoding {shown(encoding)}, which was "
                "not asked for, and ranges of which are of other bytes. It must send such files as "
                "they are."
            )
        said = answer.getheader("X-Error-Message") or answer.reason
        advice = ""
        if answer.status in (401, 403):
            advice = " Has the address expired, or does it need a token or a signature?"
        kind = RefusedError if answer.status == 403 else OutlierMergeError
        raise kind(
            f"{self.address}: the server answers {answer.status} ({without_secrets(said)}).{advice}"
        )

    def _range_of(self, url: str, answer: http.client.HTTPResponse) -> tuple[int, int, int]:
        """Return the start, the end (excluded) and the file's size that an answer claims."""
        match = _CONTENT_RANGE.fullmatch(answer.getheader("Content-Range", ""))
        if match is None:
            self._client.drop(url)
            raise TransientError("the server answers without saying which range it is")
        return int(match[1]), int(match[2]) + 1, int(match[3])

    def _copy(
        self, url: str, answer: http.client.HTTPResponse, num_bytes: int, write: Write
    ) -> None:
        """Hand an answer's bytes on, which must be so many."""
        length = _length(answer)
        if length is not None and length != num_bytes:
            self._client.drop(url)
            raise TransientError(f"the server announces {length:,} bytes, not {num_bytes:,}")
        buffer, done = memoryview(bytearray(min(num_bytes, _PIECE_BYTES))), 0
        try:
            while done < num_bytes:
                count = answer.readinto(buffer[: num_bytes - done])
                if count == 0:
                    raise TransientError(f"the answer ends after {done:,} of {num_bytes:,} bytes")
                write(buffer[:count])
                done += count
            if answer.read(1):
                raise TransientError(f"the answer has more than {num_bytes:,} bytes")
        except (OSError, http.client.HTTPException) as error:
            self._client.drop(url)
            raise TransientError(_reason(error)) from None
        except BaseException:
            self._client.drop(url)
            raise


def _authorized(user: str, header: str) -> dict[str, str]:
    """Return the header for a user and password as they stand in an address; {} for none."""
    name, _, password = user.partition(":")
    plain = f"{unquote(name)}:{unquote(password)}".encode()
    return {header: "Basic " + base64.b64encode(plain).decode()} if user else {}


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _version(answer: http.client.HTTPResponse) -> str:
    return answer.getheader("ETag") or answer.getheader("Last-Modified") or ""


def _length(answer: http.client.HTTPResponse) -> int | None:
    text = answer.getheader("Content-Length", "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"the server has sent nothing for {ranges.STALL_SECONDS:g} seconds"
    return str(error) or type(error).__name__

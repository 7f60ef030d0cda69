"""One HTTP request to an OpenAI-compatible endpoint, with a deadline for the whole of it.

The standard library's client in worker threads: no dependency, and giving up closes the socket, which ends the thread's
wait. A connection serves one request; next to the seconds that a judge thinks, a handshake is nothing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from tandem.rl.errors import UserError

_LARGEST_BODY = 16 * 2**20  # bytes; a judge's reply has some kilobytes
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class RequestFailed(Exception):
    """A request without a usable answer.

    Attributes:
        retry: whether the same request may succeed later. status: HTTP status, None if there was no answer.
        wait: seconds that the server asked to wait, None if it did not.
    """

    def __init__(self, reason: str, *, retry: bool, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(reason)
        self.retry, self.status, self.wait = retry, status, wait


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: http(s) URL of the resource.
        key: API key for the Authorization header, None for servers that want none. Never shown in messages.
    """

    url: str
    key: str | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    async def post(self, body: Mapping[str, Any], seconds: float, executor: Executor) -> dict[str, Any]:
        """Send a JSON body and return the JSON object that comes back.

        Args:
            seconds: time for everything: connection, sending, thinking, reading.
            executor: threads to run in; one is busy for as long as a request takes.

        Raises:
            RequestFailed: no connection, no answer in time, a status other than 200, a cut or wrong body.
        """
        exchange = _Exchange(self, json.dumps(body).encode("ascii"), seconds)
        future = asyncio.get_running_loop().run_in_executor(executor, exchange.run)
        try:
            status, headers, content = await asyncio.wait_for(asyncio.shield(future), seconds)
        except TimeoutError:
            raise RequestFailed(f"no answer within {seconds:g} seconds", retry=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(self.clean(f"{type(error).__name__}: {error}"), retry=True) from error
        finally:
            if not future.done():
                exchange.abort()
            future.add_done_callback(_forget)
        if status != 200:
            said = self.clean(content.decode("utf-8", "replace").strip())[:300]
            wait = _retry_after(headers) if status in (429, 503) else None
            raise RequestFailed(f"HTTP {status}: {said}", retry=status in _TRANSIENT, status=status, wait=wait)
        return self._object(content)

    def clean(self, text: str) -> str:
        """The text without the API key, should a server have sent it back."""
        return text.replace(self.key, "[key]") if self.key else text

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            said = self.clean(content[:200].decode("utf-8", "replace"))
            raise RequestFailed(f"the answer is not JSON: {said!r}", retry=True, status=200) from None
        if not isinstance(value, dict):
            raise RequestFailed(f"the answer is {type(value).__name__}, not an object", retry=True, status=200)
        return value


def check_url(url: str) -> str:
    """A base URL without the slash at its end. Raises UserError if it is no http(s) URL or holds a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"base_url is {url!r}, which is no http(s) URL", fix="for example http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"base_url holds more than scheme, host and path (host {parts.hostname})",
            reason="keys do not belong in a config, which is copied into the run folder",
            fix="name an environment variable in api_key_env",
        )
    return url.rstrip("/")


class _Exchange:
    """A request in its thread; `abort` may be called from another one."""

    def __init__(self, endpoint: Endpoint, body: bytes, seconds: float) -> None:
        self._endpoint, self._body, self._seconds = endpoint, body, seconds
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._aborted = False

    def run(self) -> tuple[int, http.client.HTTPMessage, bytes]:
        if self._aborted:
            raise ConnectionAbortedError("given up before it began")
        parts = urlsplit(self._endpoint.url)
        connection, target, extra = _connection(parts.scheme, parts.hostname or "", parts.port, self._seconds)
        self._connection = connection
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close", **extra}
        if self._endpoint.key:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        try:
            connection.connect()
            # Kept apart: the connection lets go of its socket once an answer that ends with it is being read.
            self._socket = connection.sock
            if self._aborted:
                raise ConnectionAbortedError("given up while connecting")
            connection.request("POST", target + (parts.path or "/"), self._body, headers)
            response = connection.getresponse()
            content = response.read(_LARGEST_BODY + 1)
            if len(content) > _LARGEST_BODY:
                raise http.client.HTTPException(f"the answer has more than {_LARGEST_BODY} bytes")
            # A body that ends before its Content-Length: read(n) returns what there is instead of raising.
            if response.length:
                raise http.client.IncompleteRead(content, response.length)
            return response.status, response.headers, content
        finally:
            connection.close()

    def abort(self) -> None:
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already, or the other side was faster
                self._socket.shutdown(socket.SHUT_RDWR)


def _connection(
    scheme: str, host: str, port: int | None, seconds: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection, directly or through the proxy that the environment names; what goes before the path of the request;
    and further headers."""
    context = ssl.create_default_context() if scheme == "https" else None
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    if not proxy:
        if context:
            return http.client.HTTPSConnection(host, port, timeout=seconds, context=context), "", {}
        return http.client.HTTPConnection(host, port, timeout=seconds), "", {}
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = f"{unquote(via.username or '')}:{unquote(via.password or '')}" if via.username else ""
    headers = {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
    if context:
        secure = http.client.HTTPSConnection(via.hostname or "", via.port, timeout=seconds, context=context)
        secure.set_tunnel(host, port or 443, headers)
        return secure, "", {}
    plain = http.client.HTTPConnection(via.hostname or "", via.port, timeout=seconds)
    shown = f"[{host}]" if ":" in host else host
    return plain, f"http://{shown}:{port or 80}", headers


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds to wait, given as a number or as a date."""
    value = (headers.get("Retry-After") or "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _forget(future: asyncio.Future[Any]) -> None:
    """Take note of an abandoned request's end, which asyncio would otherwise report as lost."""
    if not future.cancelled():
        future.exception()

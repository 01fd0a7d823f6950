"""`receive` downloads a file within limits of size and time; the address and each redirect are checked."""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import socket
import time
from collections.abc import Callable
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import AbstractHTTPHandler, HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

TIMEOUT = 60  # seconds that a server may be silent


def receive(
    url: str, file: IO[bytes], max_bytes: int, max_seconds: float, *, check: Callable[[str], None], open: Any = None
) -> None:
    """Write the content of an http:// or https:// address to a file.

    Args:
        max_bytes, max_seconds: limits of the content's size, and of the time until it is here, redirects included.
        check: raises `ValueError` for an address that is refused; it is called with the address and with each redirect.
        open: opens the address, within a time; None is `opener(check)`.

    Raises:
        ConnectionError: the server cannot be reached, refuses, breaks off, or sends too much or too slowly.
        ValueError: `check` refuses the address or a redirect.
    """
    check(url)
    open = open or opener(check)
    start, end = file.tell(), time.monotonic() + max_seconds
    try:
        request = Request(url, headers={"User-Agent": "vovnet_zoo"})
        with open(request, timeout=max_seconds) as response:
            length = response.headers.get("Content-Length") or ""
            if length.isdigit() and int(length) > max_bytes:
                raise ConnectionError(f"it has {length} bytes, more than {max_bytes}")
            while chunk := response.read1(1 << 20):
                file.write(chunk)
                if file.tell() - start > max_bytes:
                    raise ConnectionError(f"it goes on after {max_bytes} bytes")
                if time.monotonic() > end:
                    raise ConnectionError(
                        f"it is not here after {max_seconds} seconds, {file.tell() - start} bytes are"
                    )
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: {error}; nothing was kept, try again or get the file elsewhere") from error
    if length.isdigit() and int(length) != file.tell() - start:
        raise ConnectionError(
            f"{url}: the server broke off after {file.tell() - start} of {length} bytes; nothing was kept, try again"
        )


def opener(check: Callable[[str], None]) -> Callable[..., Any]:
    """Return a function that opens a `Request` and follows the redirects that `check` and `Redirects` allow.

    Its `timeout` is a limit of seconds for all that is read, from the first answer to the end of the content.
    """

    def open(request: Request, timeout: float) -> Any:
        clock = Clock(timeout)
        return build_opener(Redirects(check), Http(clock), Https(clock)).open(request, timeout=clock.left())

    return open


class Clock:
    """A clock knows how many seconds of a transfer are left."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Return for how many seconds the server may be silent now. Raises `TimeoutError` when the time is over."""
        if (left := self.end - time.monotonic()) <= 0:
            raise TimeoutError(f"it is not here after {self.seconds} seconds")
        return min(left, TIMEOUT)


class Timed(AbstractHTTPHandler):
    """The connections of these handlers read within the time of a clock, also headers that come one by one.

    A socket's own timeout begins again with each byte, and urllib's with each redirect.
    """

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def do_open(self, http_class: Any, req: Request, **options: Any) -> http.client.HTTPResponse:
        """Open one address, as urllib's handlers do."""
        req.timeout = self.clock.left()

        def connect(*args: Any, **more: Any) -> http.client.HTTPConnection:
            made = http_class(*args, **more)
            made.response_class = functools.partial(TimedResponse, clock=self.clock)
            return made

        return super().do_open(connect, req, **options)


class Http(Timed, HTTPHandler):
    """This handler opens http:// addresses."""


class Https(Timed, HTTPSHandler):
    """This handler opens https:// addresses."""


class TimedResponse(http.client.HTTPResponse):
    """A response is read within the time of a clock."""

    def __init__(self, sock: socket.socket, *args: Any, clock: Clock, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(TimedReader(sock, clock))


class TimedReader(io.RawIOBase):
    """This file gives what a socket receives within the time of a clock."""

    def __init__(self, sock: socket.socket, clock: Clock):
        self.sock, self.clock, self.file = sock, clock, sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(self.clock.left())
        try:
            return self.file.readinto(buffer)
        except TimeoutError:
            self.clock.left()
            raise

    def close(self) -> None:
        self.file.close()
        super().close()


class Redirects(HTTPRedirectHandler):
    """A redirect leads neither from https:// to http://, nor from elsewhere to a server on this machine itself."""

    def __init__(self, check: Callable[[str], None]):
        self.check = check

    def redirect_request(self, request, *args):
        self.check(address := args[-1])
        origin, target = urlparse(request.full_url), urlparse(address)
        if origin.scheme == "https" and target.scheme != "https":
            raise ValueError(f"{request.full_url}: the server leads to {address}, which is not https://: refused")
        if is_here(target.hostname or "") and not is_loopback(origin.hostname or ""):
            raise ValueError(
                f"{request.full_url}: the server leads to {address}, on this machine itself or beside it: refused"
            )
        return super().redirect_request(request, *args)


def is_url(source: object) -> bool:
    """Tell whether a source is the address of a file on a server."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Tell whether a host's name or address stands for this machine itself, without asking a name server."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_here(host: str) -> bool:
    """Tell whether a host's name or address leads to this machine, however it is written, or to a link-local address.

    "127.1", "0.0.0.0" and a name that stands for 127.0.0.1 lead here. At the link-local address 169.254.169.254, a
    cloud tells its machines their passwords.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # nobody knows such a name
        return is_loopback(host)
    addresses = [ipaddress.ip_address(address) for address in found]
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return any(x.is_loopback or x.is_unspecified or x.is_link_local for x in plain)

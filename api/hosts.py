"""Loopback only. There are no keys yet, so the service answers this machine alone.

`check_host` refuses to bind anywhere else. The middleware refuses requests that a web page could cause: a
Host that is no loopback name (a page whose own name was rebound to 127.0.0.1), or an Origin that is none
(another site's form or script).
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import problem_response


class HostRefused(ValueError):
    """An address that the service does not bind."""


def check_host(host: str) -> str:
    """The host, if it is a loopback address or `localhost`. Raises HostRefused."""
    if not _is_loopback(host.strip("[]").lower()):
        raise HostRefused(
            f"the service does not bind {host!r}: it has no keys yet, so it answers this machine alone. "
            "Use 127.0.0.1 (the default), ::1 or localhost; from elsewhere, go through an SSH tunnel: "
            "ssh -L 8000:127.0.0.1:8000 <this machine>"
        )
    return host


class LoopbackOnly:
    """ASGI middleware: 421 for a foreign Host, 403 for a foreign Origin."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(dict(scope["headers"]))) is not None:
            status, detail = refusal
            await problem_response(status, detail, instance=scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _refusal(headers: dict[bytes, bytes]) -> tuple[int, str] | None:
    host = headers.get(b"host", b"").decode("latin-1")
    if not _leads_here("//" + host):
        return 421, f"the Host {host!r} is not this machine; ask for 127.0.0.1 or localhost"
    origin = headers.get(b"origin")
    if origin is not None and not _leads_here(origin.decode("latin-1")):
        return 403, f"requests from pages of {origin.decode('latin-1')!r} are refused"
    return None


def _leads_here(url: str) -> bool:
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return False
    return name is not None and _is_loopback(name)


def _is_loopback(name: str) -> bool:
    """Whether it is `localhost` or a loopback address: a name that only begins like one (127.example.org) is not."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

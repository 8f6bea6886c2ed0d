"""No body beyond its limit, whatever its Content-Length says: bytes are counted as they come in.

Window files have the large limit, and only where they are taken. Everything else has the one of JSON.

A body over the limit is read on and thrown away for a while before the answer is sent. A client that is still
sending would otherwise meet a closed connection instead of the answer.
"""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import Refusal, problem_response

WINDOW_TYPES = frozenset({"application/octet-stream", "application/vnd.safetensors"})
WINDOW_ROUTE = re.compile(r"/v1/models/[^/]+/windows")
DRAIN_BYTES = 16 << 20  # ours: a body a little over a JSON limit is read out, a huge one is not


class BodyLimit:
    """ASGI middleware: 413 for a JSON body or a window file over its limit."""

    def __init__(self, app: ASGIApp, json_limit_bytes: int, window_limit_bytes: int) -> None:
        self.app = app
        self.json_limit_bytes = json_limit_bytes
        self.window_limit_bytes = window_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        limit = self._limit(scope["path"], headers.get(b"content-type", b"").decode("latin-1"))
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            await _drain(receive)
            response = problem_response(413, _detail(limit), instance=scope["path"])
            await response(scope, receive, send)
            return
        await self.app(scope, _counted(receive, limit), send)

    def _limit(self, path: str, content_type: str) -> int:
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type in WINDOW_TYPES and WINDOW_ROUTE.fullmatch(path):
            return self.window_limit_bytes
        return self.json_limit_bytes


def _counted(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def counting() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > limit:
                if message.get("more_body", False):
                    await _drain(receive)
                raise Refusal(413, _detail(limit))
        return message

    return counting


async def _drain(receive: Receive) -> None:
    drained = 0
    while drained < DRAIN_BYTES:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        drained += len(message.get("body", b""))


def _detail(limit: int) -> str:
    return (
        f"the body is larger than {limit:,} bytes; send a smaller one, or raise ADVISOR_JSON_LIMIT_BYTES "
        "or ADVISOR_WINDOW_LIMIT_BYTES of the service"
    )

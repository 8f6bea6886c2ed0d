"""A tiny real HTTP server that answers as a test tells it to, and breaks where the test wants it to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """Answers by "METHOD path", in order, the last one again and again: (status, body) or a function."""

    url: str
    answers: dict[str, list[Any]]
    seen: list[Seen] = field(default_factory=list)


@contextlib.contextmanager
def serving(answers: dict[str, list[Any]]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.seen.append(Seen(self.command, self.path, headers, body))
            left = answers[f"{self.command} {self.path}"]
            answer = left.pop(0) if len(left) > 1 else left[0]
            if callable(answer):
                answer(self)
                return
            status, content = answer
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}", answers)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def stream(*events: tuple[int, str, dict[str, Any]], cut: bool = False) -> Callable[[BaseHTTPRequestHandler], None]:
    """Sends these events in chunks; `cut`: breaks off in the middle of the next one."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        texts = [": still here\n\n"]
        texts += [f"id: {place}\nevent: {kind}\ndata: {json.dumps(data)}\n\n" for place, kind, data in events]
        if cut:
            texts.append("id: 99\nevent: step\ndata: {")
        for text in texts:
            handler.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return send

"""`advisor serve`: the HTTP server in this process, and beside it one worker process that is kept alive."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import structlog
import uvicorn

from api import log
from api.app import create_app
from api.context import Services
from api.hosts import check_host
from api.jobs.worker import settings_text
from api.settings import Settings
from db import migrate
from db.session import Database

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.25, 30.0  # ours: quick after one accident, patient where each start fails
HEALTHY_S = 60.0  # a worker that lived this long starts the backoff anew
WORKER_EXIT_S = 10.0  # what a worker gets to leave in an orderly way


def serve(settings: Settings, announce: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. `announce` is called with the URL as soon as requests are answered.

    Call it from the main thread. Raises HostRefused for an address that is not loopback, OSError for a port
    in use.
    """
    check_host(settings.host)
    log.configure(settings.log_level)
    with contextlib.closing(_bind(settings)) as listener:
        upgraded = Database(settings.url)
        migrate.upgrade(upgraded)
        upgraded.close()
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=settings.shutdown_s,
        )
        with _signals_outlived(), WorkerKeeper(settings):
            _Server(config, app.state.services, announce).run(sockets=[listener])


@contextlib.contextmanager
def _signals_outlived() -> Iterator[None]:
    """uvicorn raises the signals that it caught once more when it is done; the worker must still be stopped then."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """Tells when it listens, and tells open event streams when it stops."""

    def __init__(self, config: uvicorn.Config, services: Services, announce: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._services = services
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            url = _url(sockets[0])
            structlog.get_logger("api").info("serving", url=url)
            if self._announce is not None:
                self._announce(url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._services.stopping.set()
        super().handle_exit(sig, frame)


class WorkerKeeper:
    """Keeps one worker process alive for as long as the block lasts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="worker keeper", daemon=True)

    def __enter__(self) -> "WorkerKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stop.is_set():
            started = time.monotonic()
            # The kernel ties the worker to the thread that starts it (jobs/parent.py): this one, which outlives it.
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "api.jobs.worker", str(os.getpid()), settings_text(self.settings)],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches the server, which stops the worker
            )
            while worker.poll() is None and not self._stop.wait(0.1):
                pass
            if self._stop.is_set():
                _end(worker)
                return
            if time.monotonic() - started > HEALTHY_S:
                backoff_s = FIRST_BACKOFF_S
            structlog.get_logger("api").warning("worker died", status=worker.returncode, again_in_s=backoff_s)
            self._stop.wait(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.terminate()
    try:
        worker.wait(WORKER_EXIT_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _bind(settings: Settings) -> socket.socket:
    """A listening socket's address, taken before anything else starts. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
            "choose another port (--port, or 0 for any free one)",
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""A service of our own in a process of its own: started, waited for, and cleaned up whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from advisor.errors import ServiceError

if TYPE_CHECKING:
    from advisor.client import Client

# Ours: importing torch twice on a cold and busy machine stays well below it.
START_LIMIT_S = 120.0
STOP_LIMIT_S = 15.0
POLL_S = 0.1
# -P: a folder named `api` where the demo was started must not stand in for ours.
SERVE = (sys.executable, "-P", "-m", "advisor.cli", "serve")
# Threads of torch, unless the user says otherwise. Measured on two cores with matrices as small as the demo's: a
# second thread gains nothing on an idle machine, and on a busy one the two wait for each other, 14 times slower.
THREADS = "1"
LOG_LINES, LOG_LINE = 8, 600


@dataclass(frozen=True)
class ServiceProcess:
    """process: leads a process group that holds the service, its worker and its jobs."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str

    @property
    def log(self) -> Path:
        return self.folder / "service.log"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def wait_until_ready(self, client: Client) -> None:
        """Returns when /readyz says so.

        Raises ServiceError, with the end of the log, if that does not come.
        """
        until = time.monotonic() + START_LIMIT_S
        while not client.ready():
            if self.process.poll() is not None:
                raise ServiceError(f"the service ended with status {self.process.returncode}:\n{self.log_end()}")
            if time.monotonic() > until:
                raise ServiceError(f"the service is not ready after {START_LIMIT_S:.0f} s:\n{self.log_end()}")
            time.sleep(POLL_S)

    def log_end(self) -> str:
        """The last lines of the service's log; of a long one (a traceback in JSON) its two ends."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        half = LOG_LINE // 2
        cut = [line if len(line) <= LOG_LINE else f"{line[:half]} … {line[-half:]}" for line in lines]
        return "\n".join(cut) or "(its log is empty)"

    def stop(self) -> None:
        """End the process and everything in its group, gently first, and remove the folder."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running(keep: bool = False) -> Iterator[ServiceProcess]:
    """A service on a free port with an empty database in a temporary folder; gone afterwards.

    keep: leave it running if the block ends without an error.
    """
    folder = Path(tempfile.mkdtemp(prefix="numerics-advisor-"))
    port = _free_port()
    service = None
    with _terminated_like_interrupted():
        try:
            with (folder / "service.log").open("wb") as log:
                process = subprocess.Popen(
                    [*SERVE, "--port", str(port), "--data-dir", str(folder / "data")],
                    env={"OMP_NUM_THREADS": THREADS, **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C comes to us alone; we end the rest in order
                )
            service = ServiceProcess(process, folder, f"http://127.0.0.1:{port}")
            yield service
        except ServiceError as error:
            keep = False
            if service is None or "\n" in str(error):
                raise
            raise ServiceError(f"{error}\nThe end of the service's log:\n{service.log_end()}") from error
        except BaseException:
            keep = False
            raise
        finally:
            if service is None:
                shutil.rmtree(folder, ignore_errors=True)
            elif not keep:
                service.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that the clean-up runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""A folder for numba's compiled kernels where it would find none: a read-only installation, and a home that is, too."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path


def provide() -> None:
    """Without a folder that it may write to numba refuses to define a kernel. Then it gets one for the life of this
    process, which the processes that this one starts use, too."""
    beside = Path(__file__).parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"
    if os.environ.get("NUMBA_CACHE_DIR") or _may_write(beside / "__pycache__") or _may_write(home):
        return
    with suppress(OSError):  # where there is none at all numba says so
        folder = tempfile.mkdtemp(prefix="numerics-advisor-kernels-")
        os.environ["NUMBA_CACHE_DIR"] = folder
        if "numba" in sys.modules:  # which read the environment when it was imported
            sys.modules["numba"].config.CACHE_DIR = folder
        atexit.register(_remove, folder, os.getpid())
        warnings.warn(
            "compiled kernels cannot be kept beside the program or at home and are made anew, which takes a minute: "
            "set NUMBA_CACHE_DIR to a folder of your own that lasts",
            stacklevel=2,
        )


def _may_write(folder: Path) -> bool:
    """Tried as numba does: not every file system says so beforehand."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)

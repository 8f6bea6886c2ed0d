"""numba's cache of compiled kernels, kept to the sources that these were compiled from.

numba looks at the date and size of a kernel's own file. Of functions and constants that the kernel has from other files
it sees no change: after an upgrade, or an edit, it would go on with what it compiled of the old ones.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any


def keep_to_sources(kernel: Any, *others: ModuleType) -> None:
    """Let numba forget what it has compiled of a kernel's module, and of these others, if any of them has changed.

    kernel  a function compiled with `cache=True`, not called yet
    others  the modules that its own has compiled functions, or constants for them, from

    Where sources cannot be read, or the cache not be written to, nothing is done: numba does not write to it either.
    """
    folder, own = Path(kernel.stats.cache_path), Path(kernel.py_func.__code__.co_filename)
    files = [own, *(Path(str(module.__file__)) for module in others)]
    stamp = folder / f"{own.stem}.sources"
    with suppress(OSError):
        digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
        if stamp.is_file() and stamp.read_text() == digest:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            for index in folder.glob(f"{file.stem}.*.nbi"):
                index.unlink(missing_ok=True)
        # In one step: several processes may start at once.
        descriptor, name = tempfile.mkstemp(dir=folder)
        with open(descriptor, "w") as written:
            written.write(digest)
        os.replace(name, stamp)

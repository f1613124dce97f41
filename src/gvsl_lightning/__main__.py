"""``python -m gvsl_lightning``."""

import ctypes
import gc
from contextlib import suppress

from gvsl_lightning.cli import main

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = (
    -1,
    -3,
)  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def _reuse_freed_memory() -> None:
    """Let glibc keep what is freed: a step on a CPU would map and clear it anew each time.

    But blocks over 32 MiB, the most that it allows: 64 MiB beside each other would soon be full of
    gaps, which hold as much memory again.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    _reuse_freed_memory()
    gc.freeze()  # or garbage collection copies the memory that loader processes share
    main()

"""``python -m gvsl_lightning``."""

import ctypes
from contextlib import suppress

from gvsl_lightning.cli import main

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # https://man7.org/linux/man-pages/man3/mallopt.3.html


def _reuse_freed_memory() -> None:
    """Let glibc keep large blocks: a step on a CPU would map and clear them anew each time."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    _reuse_freed_memory()
    main()

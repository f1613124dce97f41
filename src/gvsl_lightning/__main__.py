"""``python -m gvsl_lightning``."""

import codecs
import ctypes
import gc
import locale
import os
import signal
import sys
from contextlib import suppress

from gvsl_lightning.cli.help import PAGE
from gvsl_lightning.runs.processes import end_with_starter

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _reuse_freed_memory() -> None:
    """Let glibc keep freed memory: else every step on a CPU maps and clears the same pages again.

    A training step of a small U-Net takes 0.9 times the CPU time. Blocks over 32 MiB, the
    documented maximum, are still returned: gaps between them would nearly double the memory.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _read_files_as_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale has another encoding."""
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        words = [sys.executable, "-X", "utf8", "-m", "gvsl_lightning", *sys.argv[1:]]
        # the program of this process and its own words
        os.execv(sys.executable, words)  # nosec B606


def run() -> None:
    """Run the command of this process; also the program ``gvsl``."""
    _read_files_as_utf8()
    end_with_starter()
    if sys.argv[1:] in ([], ["-h"], ["--help"]):  # without the seconds that imports take
        print(PAGE)
        return
    # until `main` can say what it leaves, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gvsl_lightning.cli.main import main  # slow

    _reuse_freed_memory()
    gc.freeze()  # or garbage collection copies the memory that loader processes share
    main()


if __name__ == "__main__":
    run()

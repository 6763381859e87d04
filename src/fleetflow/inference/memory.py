"""Memory of the CPU, kept between predictions.

glibc hands large blocks back to the system as they are freed and asks for new ones, page by page, at the next use: a
Light Flow that predicts 448x1024 touches 25 MB of new pages every time, which takes as long as its convolutions
(docs/performance.md). Keeping what is freed avoids it.
"""

import ctypes
import os
import sys

KEPT = 1 << 30  # bytes of freed memory that stay with the process at most
LARGEST = (1 << 28, 1 << 25)  # bytes of the largest block that is kept; older versions of glibc allow the second only
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of malloc.h


def keep_freed() -> bool:
    """Tells malloc to keep freed memory, up to 1 GiB, for the rest of this process; returns whether it does.

    It does nothing where there is no glibc, and where the environment sets malloc's behavior itself
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST) and bool(mallopt(TRIM_THRESHOLD, KEPT))

"""Memory of the host that programs free, kept for what they need next."""
from __future__ import annotations

import ctypes

# Options of mallopt(3), by glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed, and returns whether it does; to be called before other threads start.

    On CPU, XLA allocates what a program needs in between anew each time it runs. glibc gives pieces of more than 32 MiB
    back to the system at once, whose pages are then made anew as well: gigabytes of them in each gradient step
    (docs/performance.md). Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no way to look it up
        return False
    # Pieces that large are kept in the one arena that grows with the process's heap, which is never cut.
    return all(mallopt(option, value) for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))

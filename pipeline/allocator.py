"""Memory that is freed stays with the process: the next batch takes it again, with no help of the kernel."""

import ctypes
import os

# glibc's <malloc.h>, `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

# Larger blocks come from the kernel and go back to it: weights, not what a batch needs for milliseconds.
LARGEST_KEPT_BYTES = 256 * 1024 * 1024
# What is free at the end of the heap goes back beyond this.
MOST_FREE_BYTES = 512 * 1024 * 1024


def keep_freed() -> None:
    """Have glibc keep what is freed, in one heap for all threads; called before there are threads.

    Without, a batch of 32 pictures costs mobilenet_v3_small up to 12,500 page faults, a third of its pass, or none:
    that depends on what was freed before, and so does how far memory grows. Only `predict` asks for it: making and
    scoring windows took `watch` as long with it as without. Whoever runs another allocator, or set malloc's own
    variables, knows better.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, MOST_FREE_BYTES)

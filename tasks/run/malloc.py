"""Tune the C library's memory allocator for training."""

import ctypes
import os
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # the options' numbers in mallopt
HUGE_PAGE, MADV_HUGEPAGE = 1 << 21, 14
HUGE_PAGES = 256  # reserved: half a gigabyte of addresses; only used pages take memory


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step of training, in huge pages.

    Fresh pages cost more than most of the computation in them, and huge pages save the processor page lookups
    (bench/NOTES.md, "Small steps"). Environment variables of malloc have priority; other C libraries are unchanged.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt: Any = getattr(library, "mallopt", None)
    # Larger blocks (in bytes) are mapped anew each time. An older glibc accepts at most 32 MiB.
    threshold = next((n for n in (1 << 30, 32 << 20) if mallopt is not None and mallopt(MMAP_THRESHOLD, n)), 0)
    if not threshold:
        return
    mallopt(TRIM_THRESHOLD, -1)  # never
    if sys.platform == "linux" and threshold > HUGE_PAGES * HUGE_PAGE:
        library.malloc.restype = ctypes.c_void_p
        library.malloc.argtypes = (ctypes.c_size_t,)
        library.free.argtypes = (ctypes.c_void_p,)
        library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        # Freed but not trimmed, this block is where malloc takes new memory from.
        if block := library.malloc(HUGE_PAGES * HUGE_PAGE):
            first = -(-block // HUGE_PAGE) * HUGE_PAGE
            library.madvise(first, (HUGE_PAGES - 1) * HUGE_PAGE, MADV_HUGEPAGE)
            library.free(block)

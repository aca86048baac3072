"""What a process that trains asks of the C library."""

import ctypes
import os
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names of its options
HUGE_PAGE, MADV_HUGEPAGE = 1 << 21, 14
HUGE_PAGES = 256  # how many are reserved: half a gigabyte of addresses, of which only what is used takes memory


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, for the next step of training, in huge pages.

    Fresh pages cost more than most of what is computed in them, and huge ones spare the processor's page lookups
    (bench/NOTES.md, "Small steps"). What the environment says of malloc stands; other C libraries are left alone.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt: Any = getattr(library, "mallopt", None)
    # Bytes above which a block is mapped anew each time; an older glibc takes no more than 32 MiB.
    threshold = next((n for n in (1 << 30, 32 << 20) if mallopt is not None and mallopt(MMAP_THRESHOLD, n)), 0)
    if not threshold:
        return
    mallopt(TRIM_THRESHOLD, -1)  # never
    if sys.platform == "linux" and threshold > HUGE_PAGES * HUGE_PAGE:
        library.malloc.restype = ctypes.c_void_p
        library.malloc.argtypes = (ctypes.c_size_t,)
        library.free.argtypes = (ctypes.c_void_p,)
        library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        # Not to be trimmed, it stays where malloc takes new memory from.
        if block := library.malloc(HUGE_PAGES * HUGE_PAGE):
            first = -(-block // HUGE_PAGE) * HUGE_PAGE
            library.madvise(first, (HUGE_PAGES - 1) * HUGE_PAGE, MADV_HUGEPAGE)
            library.free(block)

"""What a process that trains asks of the C library."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names of its options


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, for the next step of training.

    Fresh pages cost more than most of what is computed in them (bench/NOTES.md). What the environment says of malloc
    stands; other C libraries are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)  # bytes; larger blocks are mapped each time
        mallopt(TRIM_THRESHOLD, -1)  # never

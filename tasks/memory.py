"""What a process that trains asks of the C library."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names of its options


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, for the next step of training.

    Fresh pages cost more than most of what is computed in them (bench/NOTES.md). What the environment says of malloc
    stands; other C libraries are left alone.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    # Bytes above which a block is mapped anew each time; an older glibc takes no more than 32 MiB.
    if mallopt is not None and any(mallopt(MMAP_THRESHOLD, size) for size in (1 << 30, 32 << 20)):
        mallopt(TRIM_THRESHOLD, -1)  # never

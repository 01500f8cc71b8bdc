"""What of a file is in the page cache, and how to get it out: cached pages are memory that no cgroup pays for."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and in folders among them."""
    return [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]


def cached_bytes(paths: Iterable[Path]) -> int:
    """Bytes of files, and of files in folders, that are in the page cache now (`mincore`)."""
    return sum(_cached_pages(file) * mmap.PAGESIZE for file in files_in(paths))


def drop(paths: Iterable[Path]) -> None:
    """Write files, and files in folders, to disk and take them out of the page cache.

    Raises:
        RuntimeError: pages stayed, for instance because a process has them mapped.
    """
    for file in files_in(paths):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if pages := _cached_pages(file):
            raise RuntimeError(f"{file}: {pages} pages stay in the page cache; is the file mapped, or on a tmpfs?")


def _cached_pages(file: Path) -> int:
    size = file.stat().st_size
    if not size:
        return 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        failed = _libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        error = ctypes.get_errno()
        del view  # the mapping cannot be closed while it is in use
    if failed:
        raise OSError(error, os.strerror(error), str(file))
    return int(np.count_nonzero(pages & 1))

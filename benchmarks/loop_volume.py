"""A small file system with a read-ahead of its own: a page fault on it brings in less than the disk's setting says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted(image: Path, size_bytes: int, read_ahead_bytes: int) -> Iterator[Path]:
    """Mount a new ext4 in the file `image`, which must not exist; its reads bypass the page cache of the file.

    Raises:
        CalledProcessError: this is no root, or there are no loop devices.
        FileNotFoundError: `mkfs.ext4` or `losetup` is not installed.
    """
    folder = image.with_name(image.name + ".mounted")
    folder.mkdir()
    with image.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    _output("mkfs.ext4", "-q", "-m", "0", str(image))
    device = Path(_output("losetup", "--direct-io=on", "--find", "--show", str(image)).strip())
    try:
        (Path("/sys/block") / device.name / "queue" / "read_ahead_kb").write_text(str(read_ahead_bytes // 1024))
        _output("mount", str(device), str(folder))
        try:
            yield folder
        finally:
            _output("umount", str(folder))
    finally:
        _output("losetup", "--detach", str(device))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

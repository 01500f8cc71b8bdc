"""Builds the guest's initramfs in pure Python: a gzip'd newc archive, with no cpio and no root."""

from __future__ import annotations

import gzip
import lzma
import re
import stat
from pathlib import Path

#: Of the kernel's modules, those that CXL memory needs; what they depend on is found.
_MODULES = ("device_dax", "kmem", "cxl_acpi", "cxl_pci", "cxl_mem", "dax_cxl")
_COMMANDS = ("sh", "mount", "insmod", "cat", "dmesg", "grep", "tail", "poweroff")
_LIBRARIES = ("ld-linux-x86-64*", "libc.so.6", "libm.so.6", "libffi.so.8*", "libz.so.1*", "libexpat.so.1*")
#: Parts of Python's library that nobody imports here and that would only lengthen the boot.
_UNUSED = {"idlelib", "tkinter", "ensurepip", "pydoc_data", "unittest", "xmlrpc", "wsgiref", "curses", "dbm", "sqlite3"}
_LIBRARY_FOLDER = "lib/x86_64-linux-gnu"
#: What of our package runs in the guest. Its own `__init__.py` files stay out: they import more.
_PACKAGE_FILES = ("units.py", "errors.py", "control/striping.py", "linux/*.py")


class Archive:
    """Files of a newc archive, in the order in which they are added; folders are added as needed."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def add(self, path: str, data: bytes = b"", mode: int = stat.S_IFREG | 0o755) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self._entries:
            self.add(parent, mode=stat.S_IFDIR | 0o755)
        self._entries[path] = (mode, data)

    def add_link(self, path: str, target: str) -> None:
        self.add(path, target.encode(), stat.S_IFLNK | 0o777)

    def write(self, path: Path) -> None:
        parts = []
        for number, (name, (mode, data)) in enumerate([*self._entries.items(), ("TRAILER!!!", (0, b""))], 1):
            # inode, mode, user, group, links, time, size, device, special device, length of the name, checksum
            numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
            header = "070701" + "".join(f"{value:08x}" for value in numbers)
            parts += [_padded(header.encode() + name.encode() + b"\0"), _padded(data)]
        path.write_bytes(gzip.compress(b"".join(parts), compresslevel=1))


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def build(root: Path, package: Path, output: Path) -> None:
    """Write the initramfs.

    Args:
        root: what fetch.sh unpacked.
        package: the folder of vllm_moecxl.
        output: the archive to write.
    """
    archive = Archive()
    for folder in ("proc", "sys", "dev", "tmp"):
        archive.add(folder, mode=stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", (root / "usr/bin/busybox").read_bytes())
    for command in _COMMANDS:
        archive.add_link(f"bin/{command}", "busybox")
    _add_python(archive, root)
    _add_modules(archive, root)
    here = Path(__file__).parent
    archive.add("init", (here / "init").read_bytes())
    for name in ("guest.py", "guest_cxl.py"):
        archive.add(f"tests/cxl_vm/{name}", (here / name).read_bytes())
    for path in sorted(path for pattern in _PACKAGE_FILES for path in package.glob(pattern)):
        archive.add(f"vllm_moecxl/{path.relative_to(package)}", path.read_bytes())
    archive.write(output)


def _add_python(archive: Archive, root: Path) -> None:
    archive.add("usr/bin/python3", (root / "usr/bin/python3.13").read_bytes())
    for pattern in _LIBRARIES:
        for path in sorted((root / "usr" / _LIBRARY_FOLDER).glob(pattern)):
            archive.add(f"{_LIBRARY_FOLDER}/{path.name}", path.read_bytes())
    archive.add_link("lib64", _LIBRARY_FOLDER)
    library = root / "usr/lib/python3.13"
    for path in sorted(library.rglob("*")):
        if path.is_file() and not _UNUSED.intersection(path.relative_to(library).parts):
            archive.add(f"usr/lib/python3.13/{path.relative_to(library)}", path.read_bytes())


def _add_modules(archive: Archive, root: Path) -> None:
    """Modules, decompressed, and the order in which to load them."""
    found = {
        path.name.partition(".")[0].replace("-", "_"): path
        for path in (root / "usr/lib/modules").rglob("*.ko*")
        if path.name.partition(".")[2] in ("ko", "ko.xz")
    }
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in found:
            return  # A name that is not found is built into the kernel.
        data = found[name].read_bytes()
        if found[name].suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in filter(None, (depends[1].decode() if depends else "").split(",")):
            add(needed.replace("-", "_"))
        order.append(name)
        archive.add(f"modules/{name}.ko", data)

    for name in _MODULES:
        add(name)
    archive.add("modules/order", "\n".join(order).encode())

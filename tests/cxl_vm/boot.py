"""Boots the guest: a machine with two CXL memory devices, in software, and gives what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

#: A machine with 1 GiB on node 0. Two CXL host bridges, each with a window, and so a NUMA node, of its own, and a
#: device. The generic ports carry what the firmware says about the way to the bridges.
_MACHINE = """
-accel tcg,thread=multi -smp 2 -machine q35,cxl=on,hmat=on -m 1G,maxmem=8G,slots=8
-cpu max,-hypervisor
-object memory-backend-ram,size=1G,id=dram
-numa node,nodeid=0,memdev=dram,cpus=0-1,initiator=0
-numa node,nodeid=1,initiator=0 -object acpi-generic-port,id=port1,pci-bus=cxl.1,node=1
-numa node,nodeid=2,initiator=0 -object acpi-generic-port,id=port2,pci-bus=cxl.2,node=2
-numa hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-latency,latency=110
-numa hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-bandwidth,bandwidth=204800M
-numa hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=50
-numa hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-bandwidth,bandwidth=65536M
-numa hmat-lb,initiator=0,target=2,hierarchy=memory,data-type=access-latency,latency=50
-numa hmat-lb,initiator=0,target=2,hierarchy=memory,data-type=access-bandwidth,bandwidth=65536M
-device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1 -device cxl-rp,port=0,bus=cxl.1,id=root1,chassis=0,slot=2
-device pxb-cxl,bus_nr=64,bus=pcie.0,id=cxl.2 -device cxl-rp,port=0,bus=cxl.2,id=root2,chassis=0,slot=3
-object memory-backend-ram,id=memory1,share=on,size=256M
-object memory-backend-ram,id=memory2,share=on,size=256M
-device cxl-type3,bus=root1,volatile-memdev=memory1,id=device1,sn=0xA11CE
-device cxl-type3,bus=root2,volatile-memdev=memory2,id=device2,sn=0xB0B
-M cxl-fmw.0.targets.0=cxl.1,cxl-fmw.0.size=4G,cxl-fmw.1.targets.0=cxl.2,cxl-fmw.1.size=4G
-display none -serial stdio -monitor none -no-reboot -nodefaults
"""
#: The kernel commits a region only if it can flush caches, which it thinks that it cannot in a virtual machine: hence
#: `-hypervisor` above. It says nothing on the console, which belongs to the probes' reports.
_KERNEL_OPTIONS = "console=ttyS0 panic=-1 loglevel=0"


def boot(root: Path, initrd: Path, timeout_s: float) -> str:
    """Run the guest to its end.

    Args:
        root: what fetch.sh unpacked.
        initrd: what `initrd.build` wrote.
        timeout_s: after that it is stopped.

    Returns:
        Its console, up to the point where it ended or was stopped.
    """
    library = root / "usr/lib/x86_64-linux-gnu"
    (kernel,) = root.glob("usr/lib/modules/*/vmlinuz")
    command = [
        # Debian's own loader and libraries: the host may be older.
        *(str(library / "ld-linux-x86-64.so.2"), "--library-path", str(library)),
        *(str(root / "usr/bin/qemu-system-x86_64"), "-L", str(root / "usr/share/qemu")),
        *("-L", str(root / "usr/share/seabios"), *_MACHINE.split()),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_OPTIONS),
    ]
    environment = os.environ | {"QEMU_MODULE_DIR": str(library / "qemu")}
    try:
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        output = result.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + f"\nstopped after {timeout_s} s\n".encode()
    return output.decode(errors="replace")

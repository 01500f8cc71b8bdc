"""One server for all tests of a module: starting it is what takes the time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FIXTURE_MODEL = Path(__file__).parent.parent / "fixtures" / "mixtral-tiny"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`.

    Attributes:
        url: its base address.
        log: everything it printed until it was ready.
        counter_folders: folders in shared memory that it made.
    """

    url: str
    log: str
    counter_folders: frozenset[Path]


def counter_folders() -> frozenset[Path]:
    """Counter folders of all engines on this machine."""
    return frozenset(_SHARED_MEMORY.glob("moecxl-*"))


def start(*options: str) -> tuple[subprocess.Popen[str], Server]:
    """Start a server on a free port and wait until it answers."""
    before = counter_folders()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(FIXTURE_MODEL), "--served-model-name", "tiny"),
            *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "512"),
            *("--kv-cache-memory-bytes", "64M", "--max-num-batched-tokens", "96", "--max-num-seqs", "8", *options),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    log = []
    for line in process.stdout:
        log.append(line)
        if "Application startup complete" in line:
            break
    else:
        pytest.fail(f"the server ended with {process.wait()}:\n{''.join(log[-40:])}")
    _wait_for_port(port)
    return process, Server(f"http://127.0.0.1:{port}", "".join(log), counter_folders() - before)


def _wait_for_port(port: int) -> None:
    """The log says "complete" a moment before the socket listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server said that it was ready, and never listened"
        else:
            return


def stop(process: subprocess.Popen[str]) -> None:
    """End a server as a user does, and read its log to the end."""
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)


@pytest.fixture(scope="module")
def offloading_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two API servers before one engine that offloads; the options come from a YAML file."""
    settings = tmp_path_factory.mktemp("settings") / "serve.yaml"
    settings.write_text('moe-offload: cxl\nmoe-offload-config: {slots: "50%", in_place: never}\napi-server-count: 2\n')
    process, server = start("--config", str(settings))
    yield server
    stop(process)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)

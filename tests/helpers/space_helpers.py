"""A running page of the tests' pair, in a process of its own; ``pytest_plugins = ["space_helpers"]`` shares one."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from hub.ports import reserved_port
from small_pair import DRAFTER, TARGET


class Server:
    """``ppow space`` while it runs: its address and its memory."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def megabytes(self) -> float:
        """Resident memory of the server."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def serve(log: Path, *options: str, threads: int | None = 1):
    """Start ``ppow space`` with ``options`` on a free port and wait until it answers; no ``threads``: torch chooses."""
    with reserved_port() as port, log.open("w") as output:
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "ppow.training.cli", "space", "--port", str(port), *options]
        command += [] if threads is None else ["--threads", str(threads)]
        environment = {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1", "TMPDIR": str(log.parent)}
        # one arena of the allocator: memory that threads have given back is used again, whichever thread asks
        environment = os.environ | environment | {"MALLOC_ARENA_MAX": "1"}
        if threads is None:  # torch's own choice, not the tests'
            environment.pop("OMP_NUM_THREADS", None)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until_it_answers(process, url, log)
            yield Server(process, url, log)
        finally:
            process.kill()
            process.wait()


def wait_until_it_answers(process, url: str, log: Path) -> None:
    """As long as the process lives and pytest's own limit allows: how long a start takes is no property of the page."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"it has ended:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The page of the tests' pair, one for all tests of this process: its start costs more than most of them."""
    names = "--target", str(TARGET), "--drafter", str(DRAFTER)
    with serve(tmp_path_factory.mktemp("space") / "log.txt", *names) as server:
        yield server

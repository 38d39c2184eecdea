"""`vllm serve`, as a user types it, on a free port of the loopback."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from .engine_process import REPOSITORY, TIMEOUT_S, engine_environment

VLLM = str(Path(sys.executable).with_name("vllm"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve_command(model: Path | str, port: int) -> list[str]:
    """The command line: the flag alone switches capture on; the rest keeps the server small."""
    return [
        *(VLLM, "serve", str(model), "--enable-return-routed-experts"),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32"),
        *("--block-size", "32", "--enforce-eager"),
    ]


@contextmanager
def serving(
    model: Path, log_path: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server, wait until it is healthy, yield its base URL, stop it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [*serve_command(model, port), *options],
            cwd=REPOSITORY,
            env=engine_environment(env),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start:\n{log_path.read_text()[-8000:]}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def failing_serve(model: Path | str, port: int) -> str:
    """Run a server that must refuse to start; returns the last line that it printed.

    Without the name of the process that vLLM 0.30 puts before each line.
    """
    done = subprocess.run(
        serve_command(model, port),
        cwd=REPOSITORY,
        env=engine_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0, "the server started and stopped without an error"
    return re.sub(r"^\(\w+ pid=\d+\) ", "", done.stdout.strip().splitlines()[-1])


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False

"""`vllm serve` on loopback, as a user types it, for as long as a `with` block lasts."""

import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from examples.demo import DemoError

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 20
LOG_LINES_SHOWN = 15


@contextmanager
def serve(
    model: Path, log: Path, environment: Mapping[str, str], options: Sequence[str] = ()
) -> Iterator[str]:
    """Serve `model` in bf16 with routed experts on a free port; yield its OpenAI base URL.

    `options` are further ones of `vllm serve`, such as `--tensor-parallel-size 8`.

    The plugin is not named anywhere here: vLLM finds it through the entry point of the installed
    package. The server's output goes to `log`, and its whole process group ends with the block.

    Raises:
        DemoError: the server ended, or was not ready in time; holds the last lines of its log.

    """
    port = _free_port()
    command = [
        str(Path(sysconfig.get_path("scripts")) / "vllm"),
        *("serve", str(model), "--served-model-name", "policy"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        "--enable-return-routed-experts",
        "--enforce-eager",  # compiling takes longer than these few tokens, and needs g++
        *options,
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **environment},  # GiB; the default is far more
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops it
        )
        try:
            _wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(server)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"vllm serve ended with status {server.returncode}. {_tail(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise DemoError(f"vllm serve was not ready after {START_TIMEOUT_S} s. {_tail(log)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its engine processes, by force if they do not end by themselves."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, end)
        except ProcessLookupError:
            return
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join([f"The last lines of {log}:", *lines])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

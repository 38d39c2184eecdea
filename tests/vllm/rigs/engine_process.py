"""Runs a function that starts a vLLM engine in a process of its own.

vLLM reads its environment when it is imported and keeps global state (process groups, patched
classes, compiled modules), so two engines with different settings do not share a process.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 600


def engine_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the settings that every engine in these tests runs under."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # A tiny model spends its time in thread barriers otherwise.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(env or {}),
    }


class EngineProcessError(AssertionError):
    """The function raised in its process; `log` holds all that the process printed."""

    def __init__(self, function: str, log: str) -> None:
        super().__init__(f"{function} failed in its engine process:\n{log[-8000:]}")
        self.log = log


def run_in_engine_process(
    function: Callable[..., Any],
    *args: Any,
    in_process_core: bool = True,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Call a module-level `function` in a fresh interpreter and return its (pickled) result.

    With `in_process_core` scheduler and worker live in that process too, where a rig reaches them.
    """
    if in_process_core:
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder, "call"), Path(folder, "result")
        call.write_bytes(pickle.dumps((function, args)))
        with open(Path(folder, "log"), "w+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(call), str(result)],
                cwd=REPOSITORY,
                env=engine_environment(env),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.write(f"\nstopped after {TIMEOUT_S} s")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(0)
            if not result.exists():
                raise EngineProcessError(function.__qualname__, log.read())
        return pickle.loads(result.read_bytes())


def _main(call: str, result: str) -> None:
    function, args = pickle.loads(Path(call).read_bytes())
    value = function(*args)
    Path(result).write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
